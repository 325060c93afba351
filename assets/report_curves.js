// Which curves are drawn of one run, and which of several.

const data = JSON.parse(document.getElementById("data").textContent);
const colorOf = (i) => `var(--c${i % 7})`;
// After the palette, colours come again with other dashes.
const dashOf = (i) => [null, "7 4", "2 3"][Math.floor(i / 7) % 3];
const alone = data.runs.length === 1;
view.runs = data.runs;

for (const [i, run] of data.runs.entries()) {
  Object.assign(run, { color: colorOf(i), dash: dashOf(i) });
  const { loss, val_loss: validation, lr, scores, clock } = run.curves;
  const steps = [loss.raw, validation, lr, clock, ...scores].map((curve) => curve.x.at(-1) || 0);
  run.lastStep = Math.max(...steps);
}
const longest = Math.max(...data.runs.map((run) => run.curves.clock.y.at(-1) || 0));
[view.unit, view.unitName] =
  longest > 3 * 3600 ? [3600, "h"] : longest > 300 ? [60, "min"] : [1, "s"];

/** Return buttons that show or hide each run in all charts. */
function runLegend() {
  return element(
    "div",
    { class: "legend runs" },
    ...data.runs.map((run) =>
      legendEntry(run.name, { kind: "run", color: run.color, run }, () => {
        run.hidden = !run.hidden;
        for (const chart of view.charts) chart.draw();
        return !run.hidden;
      }),
    ),
  );
}

/** Return the series of one quantity: of one run as it is and smoothed, of several smoothed. */
function noisySeries(key, label) {
  return data.runs.flatMap((run) => {
    const { raw, smooth } = run.curves[key],
      of = { run, color: run.color, dash: run.dash };
    if (!alone)
      return [{ ...of, label: run.name, group: `${label}, smoothed`, curve: smooth, kind: "line" }];
    return [
      { ...of, label, curve: raw, kind: "faint" },
      { ...of, label: "smoothed", curve: smooth, kind: "line" },
    ];
  });
}

function lossSeries() {
  const training = noisySeries("loss", "training loss");
  // Of several runs it is the validation loss that one compares.
  if (!alone)
    for (const each of training)
      Object.assign(each, { kind: "pale", label: `${each.label}, training` });
  return [
    ...training,
    ...data.runs.map((run) => ({
      run,
      group: "validation loss",
      curve: run.curves.val_loss,
      label: alone ? "validation loss" : run.name,
      kind: "points",
      color: alone ? colorOf(1) : run.color,
      dash: run.dash,
    })),
  ];
}

/** Return the quantities of which there are scores: all shares in one, any other by itself. */
function scoreChoices() {
  const all = data.runs.flatMap((run) => run.curves.scores);
  const options = {};
  if (all.some((score) => score.share)) options.shares = "right answers";
  for (const { share, task, metric } of all) {
    options[`${task} ${metric}`] = `${task} ${metric}${share ? " (%)" : ""}`;
  }
  return options;
}

function scoreSeries(key) {
  const chosen = (score) =>
    key === "shares" ? score.chosen : `${score.task} ${score.metric}` === key;
  const names = [
    ...new Set(
      data.runs.flatMap((run) =>
        run.curves.scores.filter(chosen).map((score) => `${score.task} ${score.metric}`),
      ),
    ),
  ];
  return data.runs.flatMap((run) =>
    run.curves.scores.filter(chosen).map((score) => {
      const name = `${score.task} ${score.metric}`,
        i = names.indexOf(name);
      return {
        run,
        curve: score,
        error: score.error,
        kind: "line",
        group: name,
        label: alone ? name : `${run.name}: ${name}`,
        color: alone ? colorOf(i) : run.color,
        dash: alone ? null : [null, "7 4", "2 3", "9 3 2 3"][i % 4],
      };
    }),
  );
}

function scoreRules(key) {
  const shown = scoreSeries(key).map(({ curve }) => `${curve.task} ${curve.metric}`);
  return data.baselines.scores.filter((rule) => shown.includes(`${rule.task} ${rule.metric}`));
}

function charts() {
  const options = scoreChoices(),
    made = [];
  const points = (value) => (value === undefined ? "" : short(value));
  made.push(
    new Chart({
      title: "Loss, nats a token",
      size: "",
      height: 360,
      series: lossSeries(),
      log: false,
      rules: data.baselines.loss,
      cut: true,
      format: (value) => value.toFixed(4),
    }),
  );
  if (Object.keys(options).length) {
    const first = Object.keys(options)[0];
    const select = element(
      "select",
      {
        "aria-label": "score",
        onchange: () => {
          chart.rules = scoreRules(select.value);
          chart.setSeries(scoreSeries(select.value));
          chart.draw();
        },
      },
      ...Object.entries(options).map(([value, name]) => element("option", { value }, name)),
    );
    const chart = new Chart({
      title: "Scores, in bands of one standard error",
      size: "",
      height: 300,
      log: false,
      series: scoreSeries(first),
      rules: scoreRules(first),
      extra: select,
      format: points,
    });
    made.push(chart);
  }
  const rates = data.runs.map((run) => ({
    run,
    label: alone ? "learning rate" : run.name,
    kind: "line",
    group: "learning rate",
    curve: run.curves.lr,
    color: run.color,
    dash: run.dash,
  }));
  made.push(
    new Chart({
      title: "Gradient norm",
      size: "third",
      height: 210,
      log: true,
      series: noisySeries("grad_norm", "gradient norm"),
      format: points,
    }),
  );
  made.push(
    new Chart({
      title: "Learning rate",
      size: "third",
      height: 210,
      series: rates,
      log: false,
      format: (value) => value.toPrecision(4),
    }),
  );
  made.push(
    new Chart({
      title: "Tokens a second",
      size: "third",
      height: 210,
      log: false,
      series: noisySeries("speed", "tokens/s"),
      format: points,
    }),
  );
  return made.map((chart) => chart.box);
}

function curveSection() {
  const reset = element(
    "button",
    { type: "button", id: "reset", disabled: true, onclick: () => zoom(null) },
    "show all",
  );
  view.onZoom = () => {
    reset.disabled = view.range === null;
  };
  const zoomIn = element(
    "button",
    { type: "button", "aria-label": "zoom in", onclick: () => zoomBy(0.5) },
    "+",
  );
  const zoomOut = element(
    "button",
    { type: "button", "aria-label": "zoom out", onclick: () => zoomBy(2) },
    "−",
  );
  return [
    heading("curves", "Curves"),
    element(
      "div",
      { class: "bar" },
      choice("against", AXES, view.axis, setAxis),
      element(
        "div",
        { class: "choice" },
        "zoom",
        element("span", { class: "group" }, zoomOut, zoomIn),
        reset,
      ),
    ),
    alone ? null : runLegend(),
    element("div", { class: "charts" }, ...charts()),
    text(
      "Drag across a chart to zoom, double-click to see all again; a name in a legend hides " +
        "its curve. " +
        "Long curves show the least and the greatest value of each stretch, so no spike is lost.",
      "soft",
    ),
  ];
}
