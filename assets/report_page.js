// The page: sections made of the data, all of whose texts are shown as texts.

const runName = (run, details = true) =>
  element(
    "span",
    { class: "run" },
    element("span", { class: "swatch", style: { color: run.color } }),
    element("span", {}, run.name, details ? element("small", {}, run.subtitle) : null),
  );

function header() {
  const parts = [element("h1", {}, data.title)];
  if (alone) {
    const [run] = data.runs;
    parts.push(
      text(run.subtitle, "subtitle"),
      ...run.remarks.map((remark) => text(remark, "remark")),
      element(
        "dl",
        { class: "tiles" },
        ...run.headline.map(([label, value]) => {
          const [main, at] = value.split(/ (?=at |of |\()/, 2);
          return element(
            "div",
            { class: "tile" },
            element("dt", {}, label),
            element(
              "dd",
              {},
              main,
              at ? element("small", {}, at.replace(/^at /, "at step ")) : null,
            ),
          );
        }),
      ),
    );
  } else {
    const labels = [...new Set(data.runs.flatMap((run) => run.headline.map(([label]) => label)))];
    parts.push(
      table(
        ["run", ...labels],
        data.runs.map((run) => [
          runName(run),
          ...labels.map((label) => new Map(run.headline).get(label) ?? "–"),
        ]),
        "summary",
      ),
    );
    parts.push(
      ...data.runs.flatMap((run) =>
        run.remarks.map((remark) => text(`${run.name}: ${remark}`, "remark")),
      ),
    );
  }
  return parts;
}

function evaluationSection() {
  if (!data.runs.some((run) => run.evaluations.length)) return [];
  const rows = new Map(),
    when = ({ at }) => (typeof at === "number" ? `step ${at.toLocaleString("en")}` : at);
  for (const [i, run] of data.runs.entries())
    for (const row of run.evaluations) {
      // Runs side by side share a row for what was measured in the same way.
      const key = JSON.stringify([row.task, row.metric, row.how, alone ? row.at : ""]);
      if (!rows.has(key)) rows.set(key, { row, scores: data.runs.map(() => "–") });
      rows.get(key).scores[i] = element(
        "span",
        { class: "score" },
        row.score,
        alone ? null : element("small", {}, when(row)),
      );
    }
  const known = [...rows.values()].some(({ row }) => row.published.length);
  const head = [
    "task",
    "metric",
    ...(alone ? ["score"] : data.runs.map((run) => run.name)),
    "measured",
  ];
  return [
    heading("evaluations", "Evaluations"),
    table(
      known ? [...head, "published for OpenAI's model"] : head,
      [...rows.values()].map(({ row, scores }) => [
        row.task,
        row.metric,
        ...scores,
        alone ? `${row.how}, ${when(row)}` : row.how,
        ...(known ? [row.published.join("; ") || "–"] : []),
      ]),
      "evaluations",
    ),
    known
      ? text(
          "Published figures are others' measurements of the model of this size, or of the " +
            "smallest one; they stand " +
            "only beside scores of all examples.",
          "soft",
        )
      : null,
  ];
}

function sampleSection() {
  const steps = [
    ...new Set(data.runs.flatMap((run) => run.samples.map((sample) => sample.step))),
  ].sort((a, b) => a - b);
  if (!steps.length) return [];
  const box = element("div"),
    output = element("output", { class: "soft" });
  const slider = element("input", {
    type: "range",
    min: 0,
    max: steps.length - 1,
    step: 1,
    value: steps.length - 1,
    "aria-label": "step of the samples",
    oninput: () => show(),
  });
  const show = () => {
    const step = steps[slider.value];
    output.textContent = `after step ${step.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    const found = data.runs.map(
      (run) => run.samples.find((sample) => sample.step === step)?.texts || [],
    );
    // One run's texts stand side by side; of several runs those that go on from one prompt do.
    const prompts = [...new Set(found.flat().map(({ prompt }) => prompt))];
    const grids = alone
      ? [found[0].map((sample) => card(`${sample.prompt} …`, sample))]
      : prompts.map((prompt) =>
          data.runs.flatMap((run, i) =>
            found[i]
              .filter((sample) => sample.prompt === prompt)
              .map((sample) => card(runName(run, false), sample)),
          ),
        );
    const silent = data.runs.filter((run, i) => !found[i].length).map((run) => run.name);
    box.replaceChildren(
      ...grids
        .flatMap((cards, i) => [
          alone ? null : element("h3", { class: "prompt" }, `${prompts[i]} …`),
          element("div", { class: "samples" }, ...cards),
        ])
        .filter(Boolean),
      ...(silent.length
        ? [text(`Nothing was sampled at this step from ${silent.join(", ")}.`, "soft after")]
        : []),
    );
  };
  show();
  return [
    heading("samples", "Samples"),
    element("div", { class: "bar" }, element("label", { class: "choice" }, "step", slider), output),
    box,
  ];
}

function card(title, { prompt, text: words }) {
  const begins = prompt && words.startsWith(prompt);
  return element(
    "article",
    { class: "sample" },
    element("h3", {}, title),
    element(
      "pre",
      {},
      begins ? element("span", {}, prompt) : null,
      begins ? words.slice(prompt.length) : words,
    ),
  );
}

/** Return tables of what a run is: where it differs from its recipe, and all the rest folded. */
function settingsSection() {
  if (!alone) return differenceSection();
  const [run] = data.runs,
    changed = run.settings.filter((setting) => setting.default !== null);
  const rows = (pairs) => pairs.map(([name, value]) => [name, element("code", {}, value)]);
  return [
    heading("configuration", "Configuration"),
    changed.length
      ? text("What differs from the recipe at this size:")
      : text("Everything is as the recipe has it."),
    changed.length
      ? table(
          ["field", "here", "in the recipe"],
          changed.map(({ name, value, default: other }) => [
            element("code", {}, name),
            element("code", {}, value),
            element("code", {}, other),
          ]),
          "changed settings",
        )
      : null,
    element(
      "details",
      {},
      element("summary", {}, `All ${run.settings.length} settings`),
      table(
        ["field", "value"],
        run.settings.map(({ name, value }) => [
          element("code", {}, name),
          element("code", {}, value),
        ]),
        "all settings",
      ),
    ),
    heading("facts", "Computation, data, environment"),
    table(null, run.counts, "computation"),
    table(null, rows(run.data), "data"),
    run.environment.length
      ? table(null, rows(run.environment), "environment")
      : text("There is no environment.json.", "soft"),
  ];
}

function differenceSection() {
  const tables = [
    [
      "configuration",
      "Configuration",
      (run) => run.settings.map(({ name, value }) => [name, value]),
    ],
    [
      "facts",
      "Computation, data, environment",
      (run) => [...run.counts, ...run.data, ...run.environment],
    ],
  ];
  return tables.flatMap(([id, title, of]) => {
    const maps = data.runs.map((run) => new Map(of(run)));
    const names = [...new Set(maps.flatMap((map) => [...map.keys()]))].filter(
      (name) => name !== "name" && new Set(maps.map((map) => map.get(name))).size > 1,
    );
    return [
      heading(id, title),
      names.length
        ? table(
            ["what differs", ...data.runs.map((run) => run.name)],
            names.map((name) => [
              element("code", {}, name),
              ...maps.map((map) => element("code", {}, map.get(name) ?? "–")),
            ]),
            title,
          )
        : text("There is no difference.", "soft"),
    ];
  });
}

function main() {
  const sections = [
    curveSection(),
    evaluationSection(),
    sampleSection(),
    ...insight(),
    settingsSection(),
  ].flat();
  const names = sections.filter((part) => part?.tagName === "H2");
  const page = document.getElementById("page");
  page.append(
    ...header(),
    element(
      "nav",
      { "aria-label": "sections" },
      ...names.map(({ id, textContent }) => element("a", { href: `#${id}` }, textContent)),
    ),
    ...sections.filter(Boolean),
  );
  for (const chart of view.charts) chart.draw();
  let width = page.clientWidth;
  new ResizeObserver(() => {
    if (page.clientWidth === width) return;
    width = page.clientWidth;
    zoom(view.range);
  }).observe(page);
}

main();
