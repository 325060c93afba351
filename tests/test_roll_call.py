"""What processes tell each other before they begin: mistakes, settings, and who is missing."""

import threading
import time

import pytest
import torch.distributed as dist

import roll_call
from config import UserError


class Node(threading.local):
    rank = 0


@pytest.fixture
def call(monkeypatch):
    """Calls a function as two processes at once; returns what it returned or raised in each."""
    node, store = Node(), dist.HashStore()
    monkeypatch.setattr(roll_call, "rank_and_size", lambda: (node.rank, 2))
    monkeypatch.setattr(roll_call, "_connect", lambda: store)

    def as_both(function, ranks=(0, 1)):
        results = [None, None]

        def one(rank):
            node.rank = rank
            try:
                results[rank] = function(rank)
            except UserError as error:
                results[rank] = str(error)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    return as_both


def test_a_mistake_of_one_process_is_everyones(call):
    def work(rank):
        if rank == 1:
            raise UserError("There is no data here.")
        return rank

    first, second = call(lambda rank: roll_call.together("job", lambda: work(rank)))
    assert first == second and first.startswith("Process 1, on ")
    assert first.endswith("There is no data here.")
    assert call(lambda rank: roll_call.together("job", lambda: work(0))) == [0, 0]
    alike = call(lambda rank: roll_call.together("job", lambda: work(1)))
    assert alike == ["There is no data here."] * 2


def test_what_the_first_process_does_the_others_wait_for(call):
    done = []
    assert call(lambda rank: roll_call.on_main("work", lambda: done.append(rank) or 7)) == [7, None]
    assert done == [0]

    def fail():
        raise UserError("The disk is full.")

    assert call(lambda rank: roll_call.on_main("work", fail)) == ["The disk is full."] * 2


def test_other_settings_are_named(call):
    facts = [{"train.seed": 1337, "optim.lr": 0.1}, {"train.seed": 7, "optim.lr": 0.1}]
    first, second = call(lambda rank: roll_call.check_same("settings", facts[rank]))
    assert first == second and "(train.seed 1337 and 7)" in first
    assert call(lambda rank: roll_call.check_same("settings", facts[0])) == [None, None]


def test_a_process_that_does_not_come_is_named_in_time(call, monkeypatch):
    monkeypatch.setattr(roll_call, "RESTARTING", 0.3)
    first, _ = call(lambda rank: roll_call.ask("name", rank, 0.2), ranks=[0])
    assert "Of 2 processes, number 1 did not come within 0.5 s" in first
    _, second = call(lambda rank: roll_call.ask("name", rank, 0.2), ranks=[1])
    assert "number 0 did not come" in second


def test_answers_of_processes_that_are_gone_are_not_taken(call):
    """The store keeps what was there before a restart; and the first to return may be either."""
    for attempt in range(5):
        order = [0, 1] if attempt % 2 else [1, 0]

        def answer(rank, attempt=attempt, order=order):
            time.sleep(0.1 * order.index(rank))
            return roll_call.ask("name", [rank, attempt])

        assert call(answer) == [[[0, attempt], [1, attempt]]] * 2


@pytest.mark.parametrize("restarted", [0, 1])
def test_who_waits_for_a_process_that_begins_anew_does_so_too(call, monkeypatch, restarted):
    """It will ask the first question again, while the other waits for the second."""
    monkeypatch.setattr(roll_call, "_known", {})
    assert call(lambda rank: roll_call.ask("first", rank)) == [[0, 1]] * 2
    roll_call._connect().set(f"roll_call/life/{restarted}", "another")
    waiting = 1 - restarted
    said = call(lambda rank: roll_call.ask("second", rank), ranks=[waiting])[waiting]
    assert f"Process {restarted} died and was started again" in said


def test_calls_by_one_name_are_not_mixed_up(call, monkeypatch):
    """Process 0 may call again before another has read the answers to its first call."""
    monkeypatch.setattr(roll_call, "POLL", 0.002)
    monkeypatch.setattr(roll_call, "RESTARTING", 5)

    def answers(rank):
        return [roll_call.ask("name", [rank, i], 0) for i in range(50)]

    assert call(answers) == [[[[0, i], [1, i]] for i in range(50)]] * 2
