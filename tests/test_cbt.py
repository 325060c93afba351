"""The Children's Book Test, on a small file of our own in its real format."""

import io
import tarfile

import numpy as np
import pytest

import cbt
from config import UserError
from corpus.tokenizer import CharTokenizer, gpt2_tokenizer
from likelihood import Scores

CN = "CBTest/data/cbtest_CN_test_2500ex.txt"
NOUNS = ("barn", "dog", "field", "gate", "hat", "hen", "horse", "mill", "pond", "tree")
STORY = [
    "`` I do n't know , '' said the miller 's boy -LRB- he was ten -RRB- .",
    "The hen sat by the pond ;  it was a cold day !",
    *(f"Sentence {number} was about the old mill ." for number in range(3, 21)),
]


def block(
    question="She ran to the XXXXX , and sat .", answer="mill", candidates=NOUNS, story=STORY
):
    """Return a question's twenty-one lines as they are in the file."""
    lines = [f"{number} {sentence}" for number, sentence in enumerate(story, 1)]
    return [*lines, f"21 {question}\t{answer}\t\t{'|'.join(candidates)}"]


def write(path, *blocks):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\n".join(lines) + "\n\n" for lines in blocks))
    return path


def one_question(tmp_path, *arguments, **fields):
    return cbt.read_questions(write(tmp_path / "cbt.txt", block(*arguments, **fields)), "CN")[0]


@pytest.fixture
def two_parts(tmp_path):
    names = ("Ann", "Bess", "Cora", "Dot", "Eva", "Fay", "Gwen", "Hal", "Ivy", "Joan")
    return [
        write(tmp_path / "CN.txt", block(), block("XXXXX .", "hen"), block("The XXXXX", "dog")),
        write(tmp_path / "NE.txt", block("`` XXXXX ! '' he said .", "Eva", names)),
    ]


def scores(logprobs, tokens, context=(-100.0, 50)):
    nothing = np.zeros(len(logprobs), dtype=bool)
    return Scores(np.array(logprobs), np.array(tokens), nothing, nothing, *context)


def test_a_question_is_read_as_the_file_has_it(tmp_path):
    question = one_question(tmp_path)
    assert question.before == " ".join(STORY) + " She ran to the "
    assert question.after == " , and sat ."
    assert question.candidates == NOUNS and question.candidates[question.label] == "mill"


def test_one_request_a_question_with_its_candidates_as_endings(two_parts):
    tokenizer = gpt2_tokenizer()
    task = cbt.task(tokenizer, paths=two_parts)
    assert task.name == "cbt" and not task.published
    assert [question.part for question in task.examples] == ["CN", "CN", "CN", "NE"]
    for question, request in zip(task.examples, task.requests, strict=True):
        assert request.scores_context and len(request.endings) == 10
        for word, ending in zip(question.candidates, request.endings, strict=True):
            text = tokenizer.decode(np.concatenate([request.context, ending]))
            assert text == question.before + word + question.after


def test_a_limit_takes_the_first_questions_of_each_part(two_parts):
    task = cbt.task(gpt2_tokenizer(), limit=2, paths=two_parts)
    assert [question.part for question in task.examples] == ["CN", "CN", "NE"]


def test_a_blank_at_the_start_leaves_twenty_sentences_before_it(tmp_path):
    question = one_question(tmp_path, "XXXXX sat .", "hen")
    assert question.before == " ".join(STORY) + " "
    assert question.endings()[5] == "hen sat ."


def test_a_second_blank_holds_the_same_word(tmp_path):
    question = one_question(tmp_path, "A XXXXX and a XXXXX .", "hen")
    assert question.before.endswith(" A ")
    assert question.endings()[5] == "hen and a hen ."


def test_blank_lines_and_windows_line_ends_make_no_difference(tmp_path):
    text = "\r\n".join(["", *block(), "", "", *block("XXXXX .")])
    (tmp_path / "cbt.txt").write_bytes(text.encode())
    questions = cbt.read_questions(tmp_path / "cbt.txt", "CN")
    assert len(questions) == 2 and questions[0] == one_question(tmp_path)


def test_fewer_candidates_are_scored_and_empty_ones_are_none(tmp_path):
    candidates = ("barn", "", "dog", " ", "mill", "")
    question = one_question(tmp_path, candidates=candidates)
    assert question.candidates == ("barn", "dog", "mill") and question.label == 2


def test_an_answer_is_found_in_other_letters_after_its_own(tmp_path):
    assert one_question(tmp_path, answer="mill", candidates=("hen", "Mill")).label == 1
    assert one_question(tmp_path, answer="mill", candidates=("Mill", "mill")).label == 1


def test_a_word_listed_twice_is_right_both_times(tmp_path):
    question = one_question(tmp_path, candidates=("hen", "mill", "mill"))
    # The same two texts may differ by rounding.
    for logprobs in ([-9.0, -2.0, -2.0 + 1e-9], [-9.0, -2.0 + 1e-9, -2.0]):
        assert cbt._judge(question, scores(logprobs, [5, 5, 5]))["acc"] == 1.0


def test_the_two_scorings_can_disagree(two_parts):
    """A longer ending has less log-probability, but lowers the mean loss of the whole."""
    task = cbt.task(gpt2_tokenizer(), paths=two_parts)
    question = task.examples[0]
    mill, hen = question.candidates.index("mill"), question.candidates.index("hen")
    logprobs, tokens = [-99.0] * 10, [4] * 10
    logprobs[mill], logprobs[hen], tokens[hen] = -10.0, -11.0, 8
    facts = task.judge(question, scores(logprobs, tokens))
    # (100 + 10) / 54 > (100 + 11) / 58
    assert (facts["choice"], facts["acc"]) == (mill, 1.0)
    assert (facts["choice_full"], facts["acc_full"]) == (hen, 0.0)
    # A context of one token has none that is scored: 10 / 4 > 11 / 8, but 1 / 4 < 11 / 8.
    assert task.judge(question, scores(logprobs, tokens, (0.0, 0)))["acc_full"] == 0.0
    logprobs[mill] = -1.0
    assert task.judge(question, scores(logprobs, tokens, (0.0, 0)))["acc_full"] == 1.0


def test_ties_go_to_the_first(tmp_path):
    facts = cbt._judge(one_question(tmp_path, answer="barn"), scores([-3.0] * 10, [4] * 10))
    assert facts["acc"] == facts["acc_full"] == 1.0


def test_parts_and_their_total_are_summed_up_with_errors(two_parts):
    task = cbt.task(gpt2_tokenizer(), paths=two_parts)
    facts = [
        {"part": "CN", "acc": 1.0, "acc_full": 0.0},
        {"part": "CN", "acc": 0.0, "acc_full": 0.0},
        {"part": "CN", "acc": 1.0, "acc_full": 1.0},
        {"part": "NE", "acc": 1.0, "acc_full": 0.0},
    ]
    metrics = task.summarize(facts)
    shares = {name: value for name, value in metrics.items() if not name.endswith("_stderr")}
    assert shares == pytest.approx(
        {"cn_acc": 2 / 3, "ne_acc": 1, "acc": 3 / 4}
        | {"cn_acc_full": 1 / 3, "ne_acc_full": 0, "acc_full": 1 / 4}
    )
    assert {f"{name}_stderr" for name in shares} == metrics.keys() - shares.keys()
    assert metrics["acc_stderr"] == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert task.headline in metrics


def test_a_part_by_itself_has_a_name_and_no_total(tmp_path):
    path = write(tmp_path / "V.txt", block("He XXXXX it .", "ran", ("ran", "sat")))
    task = cbt.task(gpt2_tokenizer(), parts=("V",), paths=[path])
    assert task.name == "cbt-verbs" and "verbs" in task.protocol
    metrics = task.summarize([task.judge(task.examples[0], scores([-1.0, -2.0], [3, 3]))])
    assert metrics == {"acc": 1, "acc_stderr": 0, "acc_full": 1, "acc_full_stderr": 0}


def test_detokenizing_writes_as_people_do():
    assert cbt.detokenize(STORY[0]) == "\"I don't know,\" said the miller's boy (he was ten)."
    assert cbt.detokenize("`` ` Oh , boys ' caps ! ' -LSB- sic -RSB- ''") == (
        "\"'Oh, boys' caps!' [sic]\""
    )


def test_the_detokenized_task_has_a_name_of_its_own_and_joins_at_the_blank(two_parts):
    task = cbt.task(gpt2_tokenizer(), detokenized=True, paths=two_parts)
    assert task.name == "cbt-detokenized" and "de-tokenised" in task.protocol
    assert task.examples[0].endings()[7] == "mill, and sat."
    assert task.examples[3].before.endswith(' "')
    assert task.examples[3].endings()[4] == 'Eva!" he said.'
    assert cbt.task(gpt2_tokenizer(), paths=two_parts).examples[0].after == " , and sat ."


@pytest.mark.parametrize(
    ("lines", "line", "complaint"),
    [
        (block()[1:], 1, "should be sentence 1"),
        ([*block()[:5], *block()[6:]], 6, "should be sentence 6"),
        ([*block()[:20], *block()], 21, "should be sentence 21"),
        ([*block(), *block()[20:]], 22, "should be sentence 1 "),
        ([*block()[:3], "4no blank", *block()[4:]], 4, "should be sentence 4"),
        (block(question="There is none ."), 21, "has no XXXXX"),
        (block(answer="cow"), 21, "has an answer, 'cow', that is not among its candidates"),
        (block(candidates=["", ""]), 21, "not among its candidates"),
        ([*block()[:20], "21 A XXXXX . hen hen|dog"], 21, "tabs between them"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, line, complaint):
    path = write(tmp_path / "cbt.txt", lines)
    with pytest.raises(UserError, match=complaint) as error:
        cbt.task(gpt2_tokenizer(), parts=("CN",), paths=[path])
    assert f"{path}, line {line} " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "ends before its last question"),
        ("\n".join([*block(), "", *block()[:20]]).encode(), "ends before its last question"),
        (b"1 A hen .\n2 \xff\n", "line 2 is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, complaint):
    path = tmp_path / "cbt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        cbt.task(gpt2_tokenizer(), parts=("CN",), paths=[path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_characters_is_refused(two_parts):
    with pytest.raises(UserError, match="cbt needs GPT-2's vocabulary"):
        cbt.task(CharTokenizer("abc"), paths=two_parts)


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    """An empty directory to work in; a fetch takes `CBTest.tgz` from it, if it is there."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.delenv("GPT2_DATA", raising=False)

    def fetch(place, url, *known):
        archive, path = directory / "CBTest.tgz", directory / "data" / place
        if not archive.exists():
            raise UserError(f"{url} could not be fetched.")
        path.parent.mkdir(parents=True, exist_ok=True)
        return archive.rename(path)

    monkeypatch.setattr("benchmark.fetch_file", fetch)
    return directory


def pack(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_files_are_found_in_either_place_and_a_small_one_is_not_the_published(
    no_data, two_parts, monkeypatch
):
    data = no_data.parent / "elsewhere"
    monkeypatch.setenv("GPT2_DATA", str(data))
    names, nouns = "cbtest_NE_test_2500ex.txt", "cbtest_CN_test_2500ex.txt"
    write(data / "cbt/CBTest/data" / names, block(candidates=["mill", "Ann"]))
    write(data / "cbt" / nouns, block())
    write(no_data / "data/cbt" / nouns, *[block(answer="hen")] * 2500)
    task = cbt.task(gpt2_tokenizer(), limit=1, fetch=False)
    assert [len(question.candidates) for question in task.examples] == [10, 2]
    assert task.path.resolve() == no_data / "data/cbt" / nouns
    assert not task.published
    assert cbt.task(gpt2_tokenizer(), parts=("CN",), limit=1).published


def test_a_part_of_the_published_file_is_refused_where_downloads_go(no_data):
    write(no_data / "data/cbt/cbtest_V_test_2500ex.txt", *[block()] * 3)
    with pytest.raises(UserError, match="has 3 rows where 2,500 are published"):
        cbt.task(gpt2_tokenizer(), parts=("V",), fetch=False)


def test_an_archive_is_fetched_once_and_only_the_parts_asked_for_are_taken_out(no_data):
    content = ("\n".join(block()) + "\n\n").encode() * 2500
    members = {CN.replace("CN", part): content for part in cbt.PARTS}
    pack(no_data / "CBTest.tgz", {"../../outside.txt": b"no", "CBTest/README": b"no", **members})
    for _ in range(2):
        task = cbt.task(gpt2_tokenizer(), limit=1)
        assert len(task.requests) == 2 and task.published
    there = {path.name for path in (no_data / "data/cbt").iterdir()}
    names = {f"cbtest_{part}_test_2500ex.txt" for part in ("CN", "NE")}
    assert there == {"CBTest.tgz", *names}
    assert not list(no_data.parent.glob("**/outside.txt"))


def test_missing_and_offline_say_what_to_fetch_and_where_to_put_it(no_data):
    with pytest.raises(UserError) as error:
        cbt.task(gpt2_tokenizer(), fetch=False)
    assert cbt.ARCHIVE.address in str(error.value) and "data/cbt/CBTest.tgz" in str(error.value)
    with pytest.raises(UserError, match="could not be fetched"):
        cbt.task(gpt2_tokenizer())


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [("half", "damaged"), ("without", "has no cbtest"), ("other", "damaged")],
)
def test_a_damaged_archive_is_named_and_nothing_is_taken_out(no_data, damage, complaint):
    archive = no_data / "data/cbt/CBTest.tgz"
    archive.parent.mkdir(parents=True)
    noise = np.random.default_rng(0).bytes(50_000)
    pack(archive, dict.fromkeys(["CBTest/README", *([] if damage == "without" else [CN])], noise))
    content = archive.read_bytes()
    archive.write_bytes(
        {"half": content[: len(content) // 2], "without": content, "other": noise}[damage]
    )
    with pytest.raises(UserError, match=complaint) as error:
        cbt.task(gpt2_tokenizer(), parts=("CN",), fetch=False)
    assert str(archive.relative_to(no_data)) in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in archive.parent.iterdir()] == ["CBTest.tgz"]
