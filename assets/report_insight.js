// What the model makes of a passage, token by token, and which sequences of the corpus are hard.

const MARKS = { "\n": "↵\n", "\t": "→\t" };
// A loss at which the colour is full: one in three thousand.
const HOTTEST = 8;

function insight() {
  return [
    ...(data.passage ? [passageSection(data.passage)] : []),
    ...(data.sequences ? [sequenceSection(data.sequences)] : []),
  ];
}

function passageSection(passage) {
  const parts = [heading("passage", "A passage, token by token")];
  if (passage.skipped) return [...parts, text(passage.skipped, "soft")];
  const left = passage.left_out
    ? ` The ${passage.left_out.toLocaleString("en")} tokens after these are left out.`
    : "";
  const bytes =
    passage.bits_per_byte === null ? "" : `, ${passage.bits_per_byte.toFixed(3)} bits a byte`;
  const loss =
    passage.loss === null
      ? "not a finite number"
      : `${passage.loss.toFixed(3)} nats a token${bytes}`;
  parts.push(
    text(
      `The ${passage.tokens} tokens are ${passage.source}, as ${passage.checkpoint} reads them: ` +
        `${loss}.${left}`,
    ),
    element(
      "div",
      { class: "bar" },
      element("span", { class: "scale soft" }, "0", element("i", {}), `${HOTTEST} nats and more`),
      element(
        "span",
        { class: "soft" },
        "Point at a token, or go with the arrow keys, for what was expected there.",
      ),
    ),
  );
  return [...parts, heatMap(passage.pieces)];
}

/** Return the text on a ground as warm as each token's loss, with the likeliest tokens at hand. */
function heatMap(pieces) {
  const tip = element("div", { class: "tip", role: "status", hidden: true });
  const spans = pieces.map(({ text: words, tokens }) => {
    const losses = tokens.map(([, loss]) => loss ?? HOTTEST);
    const mean = losses.reduce((a, b) => a + b, 0) / losses.length;
    const marked =
      words === "<|endoftext|>"
        ? [element("span", { class: "mark" }, words), "\n"]
        : [...words].flatMap((letter) =>
            MARKS[letter]
              ? [element("span", { class: "mark" }, MARKS[letter][0]), letter]
              : [letter],
          );
    return element(
      "span",
      { class: "piece", style: { "--a": (Math.min(mean / HOTTEST, 1) * 0.7).toFixed(3) } },
      ...marked,
    );
  });
  let on = -1;
  const show = (i) => {
    spans[on]?.classList.remove("on");
    on = i;
    tip.hidden = i < 0;
    if (i < 0) return;
    spans[i].classList.add("on");
    tip.replaceChildren(...pieces[i].tokens.flatMap(tokenFacts));
    const frame = box.getBoundingClientRect(),
      rects = spans[i].getClientRects(),
      at = rects[rects.length - 1] || frame;
    const below = at.bottom - frame.top + 6,
      over = rects[0].top - frame.top - tip.offsetHeight - 6;
    // Above the token where the window ends below it.
    const fits = at.bottom + tip.offsetHeight + 12 <= innerHeight;
    tip.style.top = `${fits || rects[0].top <= tip.offsetHeight ? below : over}px`;
    const last = Math.max(box.clientWidth - tip.offsetWidth - 4, 4);
    tip.style.left = `${clamp(at.left - frame.left, 4, last)}px`;
  };
  const pointed = (event) => {
    const i = spans.indexOf(event.target.closest?.(".piece"));
    if (i >= 0 && i !== on) show(i);
  };
  const box = element(
    "div",
    {
      class: "passage",
      tabindex: 0,
      role: "group",
      "aria-label": "passage with the loss of each token",
      onpointerover: pointed,
      onpointerdown: pointed,
      onpointerleave: () => show(-1),
      onblur: () => show(-1),
      onkeydown: (event) => {
        const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") show(-1);
        else if (by) {
          show(clamp(on + by, 0, spans.length - 1));
          event.preventDefault();
        }
      },
    },
    ...spans,
    tip,
  );
  return box;
}

/** Return a token's loss and probability, and what was likelier. */
function tokenFacts([shown, loss, likeliest]) {
  const percent = (p) =>
    p >= 0.0995
      ? `${(100 * p).toFixed(0)} %`
      : p >= 0.001
        ? `${(100 * p).toFixed(1)} %`
        : `${(100 * p).toPrecision(1)} %`;
  const cells = likeliest.flatMap(([word, p]) => [
    element("code", {}, visible(word)),
    element("i", { style: { width: `${Math.round(60 * (p ?? 0)) + 1}px` } }),
    element("span", {}, p === null ? "–" : percent(p)),
  ]);
  return [
    element("b", {}, visible(shown)),
    loss === null
      ? "no finite loss"
      : `${loss.toFixed(3)} nats, probability ${percent(Math.exp(-loss))}`,
    element("div", { class: "likely" }, ...cells),
  ];
}

/** Return a token with its spaces and line breaks as signs. */
const visible = (word) =>
  word.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "→");

function sequenceSection(sequences) {
  const parts = [heading("sequences", "The corpus by loss")];
  if (sequences.skipped) return [...parts, text(sequences.skipped, "soft")];
  const box = element("div", {}),
    rankings = Object.fromEntries(sequences.rankings.map((ranking) => [ranking.by, ranking]));
  const show = (by) => box.replaceChildren(...rankingParts(rankings[by]));
  show("excess");
  return [
    ...parts,
    text(
      `${sequences.reads.toLocaleString("en")} losses of ` +
        `${sequences.sequences.toLocaleString("en")} sequences. ` +
        "A sequence read early has a high loss because the model knew little; compared with its " +
        "step, what remains is the text. " +
        sequences.missing,
    ),
    element(
      "div",
      { class: "bar" },
      choice(
        "ranked by",
        { excess: "loss above that of its step", loss: "loss" },
        "excess",
        show,
      ),
    ),
    box,
  ];
}

function rankingParts({ by, highest, lowest, histogram }) {
  const signed = (value) =>
    `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(3)}`;
  const rows = (list) =>
    list.map((row) => [
      row.sequence.toLocaleString("en"),
      row.loss.toFixed(3),
      signed(row.excess),
      row.reads.toLocaleString("en"),
      row.reads > 1 ? `${row.first.toFixed(3)} → ${row.last.toFixed(3)}` : "–",
      row.text.replace(/\s+/g, " "),
    ]);
  const listed = (title, list, open) =>
    element(
      "details",
      { open },
      element("summary", {}, title),
      table(
        ["sequence", "mean loss", "above its step", "times read", "first → last", "begins"],
        rows(list),
        title,
      ),
    );
  return [
    bars(
      histogram,
      by === "loss" ? "mean loss, nats a token" : "loss above that of its step, nats a token",
    ),
    listed(`The ${highest.length} sequences with the highest loss`, highest, true),
    listed(`The ${lowest.length} with the lowest`, lowest, false),
  ];
}

function bars({ edges, counts }, title) {
  const width = 1000,
    height = 150,
    most = Math.max(...counts),
    each = width / counts.length;
  const columns = counts.map((count, i) =>
    element(
      "rect",
      {
        x: i * each + 1,
        width: each - 2,
        y: height - 20 - (125 * count) / most,
        height: (125 * count) / most,
        style: { fill: colorOf(0) },
      },
      element(
        "title",
        {},
        `${short(edges[i])} to ${short(edges[i + 1])}: ${count.toLocaleString("en")} sequences`,
      ),
    ),
  );
  const svg = element(
    "svg",
    {
      viewBox: `0 0 ${width} ${height - 18}`,
      preserveAspectRatio: "none",
      height: 130,
      role: "img",
      "aria-label": `histogram: ${title}`,
    },
    ...columns,
  );
  return element(
    "section",
    { class: "chart", style: { "margin-bottom": "12px" } },
    element("header", {}, element("h3", {}, `Sequences by ${title}`)),
    svg,
    element(
      "div",
      { class: "bar note", style: { "justify-content": "space-between" } },
      ...[0, 0.25, 0.5, 0.75, 1].map((part) =>
        element("span", {}, short(edges[Math.round(part * counts.length)])),
      ),
    ),
  );
}
