// What the charts of a page share: the x axis, what of it is zoomed to, and where one points.

const AXES = { step: "steps", tokens: "tokens", time: "training time" };
const PAD = { left: 56, right: 14, top: 10, bottom: 30 };
// axis: a key of AXES; range: what is zoomed to, null for all; charts: those on the page.
const view = { axis: "step", range: null, charts: [], unit: 1, unitName: "s" };

/** Return the index of the last of ascending numbers that is at most `value`, or 0. */
function lastBelow(numbers, value) {
  let low = 0,
    high = numbers.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (numbers[middle] <= value) low = middle;
    else high = middle;
  }
  return low;
}

/** Return y at x on a piecewise linear curve, continued through (0, 0) and past its last point. */
function interpolate(xs, ys, x) {
  if (!xs.length) return NaN;
  if (x <= xs[0]) return xs[0] ? (ys[0] * x) / xs[0] : ys[0];
  const i = Math.min(lastBelow(xs, x), xs.length - 2);
  if (i < 0) return (ys[0] / xs[0]) * x;
  const slope = (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i] || 1);
  return ys[i] + slope * (x - xs[i]);
}

/** Return where a step of a run lies on an axis, and which step lies at a place on it. */
function placeOf(run, step, axis = view.axis) {
  if (axis === "tokens") return step * run.curves.batch_tokens;
  if (axis === "step") return step;
  return interpolate(run.curves.clock.x, run.curves.clock.y, step) / view.unit;
}
function stepAt(run, place, axis = view.axis) {
  if (axis === "tokens") return place / run.curves.batch_tokens;
  if (axis === "step") return place;
  return interpolate(run.curves.clock.y, run.curves.clock.x, place * view.unit);
}

/** Return a number in a few figures with K, M, B or T. */
function short(number) {
  const size = Math.abs(number);
  for (const [limit, letter] of [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "K"],
  ])
    if (size >= limit) return `${+(number / limit).toPrecision(4)}${letter}`;
  // The shortest form in which a number below a thousandth is still readable.
  return (
    size && size < 1e-3 ? (+number.toPrecision(3)).toExponential() : `${+number.toPrecision(4)}`
  ).replace("-", "−");
}

/** Return some five round numbers between low and high, on a linear or a logarithmic scale. */
function ticks(low, high, count, logarithmic) {
  const found = [];
  if (logarithmic && high / low > 4) {
    const wide = 3 * Math.log10(high / low) > 1.6 * count;
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of wide ? [1] : [1, 2, 5]) found.push(factor * 10 ** power);
  } else {
    const rough = (high - low) / count,
      power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough) || 10 * power;
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
      found.push(i * step);
  }
  return found.filter((tick) => tick >= low - 1e-12 && tick <= high * (1 + 1e-12) + 1e-12);
}

/** Return the least and the greatest value of curves and rules between two places, with some room.
 *
 * With `cut`, a peak that squashes all else is left out; the third value is that peak, or null.
 */
function limits(shown, rules, from, to, logarithmic, cut) {
  let low = Infinity,
    high = -Infinity,
    usual = -Infinity,
    peak = null;
  for (const { places, curve, error, kind } of shown) {
    const inside = [];
    for (let i = 0; i < places.length; i++) {
      const value = curve.y[i];
      if (places[i] < from || places[i] > to || (logarithmic && value <= 0)) continue;
      low = Math.min(low, value - (error ? error[i] : 0));
      high = Math.max(high, value + (error ? error[i] : 0));
      inside.push(value);
    }
    inside.sort((a, b) => a - b);
    if (inside.length && kind !== "points")
      usual = Math.max(usual, inside[Math.floor(0.98 * (inside.length - 1))]);
  }
  if (low > high) return [logarithmic ? 1 : 0, logarithmic ? 10 : 1, null];
  for (const { values } of rules) {
    low = Math.min(low, values[0]);
    high = Math.max(high, values[1]);
  }
  if (cut && !logarithmic && usual > low && high - low > 2.5 * (usual - low)) {
    peak = high;
    high = usual;
  }
  if (logarithmic) return [Math.max(low, 1e-12) / 1.05, high * 1.05, null];
  const room = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
  return [low >= 0 ? Math.max(low - room, 0) : low - room, high + room, peak];
}

/** Return a place on the x axis in words: the step, its tokens and its time. */
function describe(run, place) {
  const step = Math.round(stepAt(run, place)),
    seconds = placeOf(run, step, "time") * view.unit;
  const time = Number.isFinite(seconds) ? `, ${short(seconds / view.unit)} ${view.unitName}` : "";
  const tokens = `${short(step * run.curves.batch_tokens)} tokens`;
  // Steps and tokens of several runs need not go together.
  if (view.runs.length > 1)
    return view.axis === "step"
      ? `step ${step.toLocaleString("en")}`
      : view.axis === "tokens"
        ? `${short(place)} tokens`
        : `${short(place)} ${view.unitName}`;
  return `step ${step.toLocaleString("en")}, ${tokens}${time}`;
}

/** Return the first and the last place of everything on the page. */
function extent() {
  const lasts = view.runs.map((run) => placeOf(run, run.lastStep)).filter(Number.isFinite);
  return [0, Math.max(...lasts, 0) || 1];
}

/** Point at a place in all charts; the values are shown in the one that is pointed at. */
function pointAt(place, chart = null) {
  view.at = place;
  for (const each of view.charts) each.point(place, each === chart);
}

/** Show what lies between two places, or with null everything. */
function zoom(range) {
  const [low, high] = extent();
  const [from, to] = (range || [low, high]).map((place) => clamp(place, low, high));
  // Nearly all is all, nearly nothing is a slip, and what has no times has no range of them.
  const part = (to - from) / (high - low);
  view.range = part > 1e-5 && part < 0.999 ? [from, to] : null;
  pointAt(null);
  for (const chart of view.charts) chart.draw();
  view.onZoom?.();
}

/** Zoom around what is pointed at, or the middle. */
function zoomBy(factor) {
  const [low, high] = view.range || extent(),
    at = view.at ?? (low + high) / 2;
  zoom([at - (at - low) * factor, at + (high - at) * factor]);
}

/** Draw against another axis; what was zoomed to stays, as the first run sees it. */
function setAxis(axis) {
  const run = view.runs[0],
    steps = view.range?.map((place) => stepAt(run, place));
  view.axis = axis;
  zoom(steps ? steps.map((step) => placeOf(run, step)) : null);
}
