// Curves that one can hover, zoom and read by keyboard. What is zoomed or pointed at in one chart
// is so in all of them.

/**
 * A panel of curves. `series` are {label, group, run, curve: {x, y}, color, dash, kind, error}:
 * kind is "line", "faint", "pale" or "points", and what has one group is one entry of the legend.
 * `rules` are {label, values: [low, high]}. `log` says whether the scale is logarithmic at first,
 * null that it never is; `cut` leaves out a peak that squashes all else; `format` writes a value;
 * `extra` is an element beside the title.
 */
class Chart {
  constructor(options) {
    const { title, size, height, series, rules = [], log = null } = options;
    const { cut = false, format = short, extra = null } = options;
    Object.assign(this, { title, height, rules, cut, format, log: log === true });
    this.svg = element("svg", {
      height,
      tabindex: 0,
      role: "img",
      onkeydown: (event) => this.onKey(event),
      onpointermove: (event) => this.onMove(event),
      onpointerdown: (event) => this.onDown(event),
      onpointerleave: () => {
        if (!this.drag) pointAt(null);
      },
      onblur: () => pointAt(null),
      ondblclick: () => zoom(null),
    });
    this.legend = element("div", { class: "legend" });
    this.note = element("p", { class: "note" });
    this.tip = element("div", { class: "tip", role: "status", hidden: true });
    const logButton =
      log === null
        ? null
        : element(
            "button",
            {
              type: "button",
              class: "log",
              "aria-pressed": String(this.log),
              onclick: () => {
                this.log = !this.log;
                logButton.setAttribute("aria-pressed", String(this.log));
                this.draw();
              },
            },
            "log scale",
          );
    this.box = element(
      "section",
      { class: `chart ${size}` },
      element(
        "header",
        {},
        element("h3", {}, title),
        element("div", { class: "choices" }, extra, logButton),
      ),
      this.legend,
      this.svg,
      this.note,
      this.tip,
    );
    this.setSeries(series);
    view.charts.push(this);
  }

  setSeries(series) {
    this.series = series.filter((each) => each.curve.x.length);
    // Of several runs a legend names the quantities; the runs are named once for all charts.
    const groups = new Map();
    for (const each of this.series) {
      each.group = each.group || each.label;
      groups.set(each.group, [...(groups.get(each.group) || []), each]);
    }
    this.legend.replaceChildren(
      ...[...groups.entries()].map(([name, members]) =>
        legendEntry(name, members[0], () => {
          for (const each of members) each.hidden = !each.hidden;
          this.draw();
          return !members[0].hidden;
        }),
      ),
      ...this.rules.map((rule) =>
        element("span", { class: "entry" }, element("span", { class: "swatch rule" }), rule.label),
      ),
    );
    this.svg.setAttribute(
      "aria-label",
      `${this.title}: ${this.series.map((s) => s.label).join(", ")}. ` +
        "Arrow keys read values, plus and minus zoom, 0 shows all.",
    );
  }

  /** Compute where the shown series lie and draw them all. */
  draw() {
    const width = Math.max(this.svg.clientWidth, 160),
      right = width - PAD.right;
    const bottom = this.height - PAD.bottom;
    this.shown = this.series.filter((each) => !each.hidden && !each.run.hidden);
    for (const each of this.shown)
      each.places = each.curve.x.map((step) => placeOf(each.run, step));
    const [low, high] = view.range || extent();
    this.x = (place) => PAD.left + ((place - low) / (high - low || 1)) * (right - PAD.left);
    this.placeAt = (x) => low + ((x - PAD.left) / (right - PAD.left)) * (high - low);
    const [bottomValue, topValue, peak] = limits(
      this.shown,
      this.rules,
      low,
      high,
      this.log,
      this.cut,
    );
    this.note.textContent =
      peak === null
        ? ""
        : `The peak of ${this.format(peak)} is above the panel; the logarithmic scale shows it.`;
    const scale = this.log ? (value) => Math.log(Math.max(value, 1e-12)) : (value) => value;
    const span = scale(topValue) - scale(bottomValue) || 1;
    this.y = (value) => bottom - ((scale(value) - scale(bottomValue)) / span) * (bottom - PAD.top);
    this.edges = { low, high, right, bottom, width };
    const id = `clip${view.charts.indexOf(this)}`;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.cross = element("g", {});
    this.svg.replaceChildren(
      element(
        "clipPath",
        { id },
        element("rect", {
          x: PAD.left,
          y: PAD.top - 2,
          width: right - PAD.left,
          height: bottom - PAD.top + 4,
        }),
      ),
      ...this.frame(bottomValue, topValue),
      element(
        "g",
        { "clip-path": `url(#${id})` },
        ...this.rules.map((rule) => this.ruleLine(rule)),
        ...this.shown.flatMap((each) => this.curvePaths(each)),
      ),
      this.cross,
    );
    if (!this.shown.some((each) => each.places.some(Number.isFinite)))
      this.svg.append(
        element(
          "text",
          { x: width / 2, y: this.height / 2, "text-anchor": "middle" },
          view.axis === "time" ? "no times are recorded" : "nothing recorded",
        ),
      );
  }

  frame(bottomValue, topValue) {
    const { low, high, right, bottom } = this.edges,
      parts = [];
    for (const tick of ticks(bottomValue, topValue, this.height > 250 ? 6 : 4, this.log)) {
      const y = Math.round(this.y(tick)) + 0.5;
      parts.push(
        element("line", { class: "grid", x1: PAD.left, x2: right, y1: y, y2: y }),
        element("text", { x: PAD.left - 7, y: y + 3.5, "text-anchor": "end" }, short(tick)),
      );
    }
    const name = view.axis === "time" ? `${AXES.time}, ${view.unitName}` : AXES[view.axis];
    for (const tick of ticks(low, high, clamp((right - PAD.left) / 90, 2, 9), false))
      parts.push(
        element("text", { x: this.x(tick), y: bottom + 15, "text-anchor": "middle" }, short(tick)),
      );
    parts.push(element("text", { x: right, y: this.height - 3, "text-anchor": "end" }, name));
    return parts;
  }

  ruleLine({ values: [low, high] }) {
    const { right } = this.edges,
      y = this.y(high),
      height = this.y(low) - y;
    return element(
      "g",
      {},
      element("rect", {
        x: PAD.left,
        y,
        width: right - PAD.left,
        height,
        style: { fill: "var(--ink)", opacity: 0.12 },
      }),
      element("line", { class: "rule", x1: PAD.left, x2: right, y1: y, y2: y }),
    );
  }

  curvePaths({ places, curve, color, kind, error, dash }) {
    const known = [];
    for (let i = 0; i < places.length; i++) {
      if (!Number.isFinite(places[i]) || (this.log && curve.y[i] <= 0)) continue;
      known.push([this.x(places[i]), this.y(curve.y[i]), i]);
    }
    const line = (points) =>
      points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
    const paths = [];
    if (error && error.some((value) => value > 0) && known.length > 1) {
      const edge = (sign) => known.map(([x, , i]) => [x, this.y(curve.y[i] + sign * error[i])]);
      paths.push(
        element("path", {
          d: `${line([...edge(1), ...edge(-1).reverse()])}Z`,
          style: { fill: color, opacity: 0.18 },
        }),
      );
    }
    paths.push(
      element("path", {
        d: line(known),
        class: `curve ${kind}`,
        "stroke-dasharray": dash || null,
        style: { stroke: color },
      }),
    );
    if (known.length <= 60 && (kind === "points" || (kind === "line" && known.length < 30)))
      paths.push(
        ...known.map(([cx, cy]) =>
          element("circle", {
            cx: cx.toFixed(1),
            cy: cy.toFixed(1),
            r: 3,
            style: { fill: color, stroke: "var(--panel)" },
          }),
        ),
      );
    return paths;
  }

  /** Return the place under a pointer, kept inside the panel. */
  under(event) {
    return this.placeAt(
      clamp(event.clientX - this.svg.getBoundingClientRect().left, PAD.left, this.edges.right),
    );
  }

  onMove(event) {
    if (!this.drag) pointAt(this.under(event), this);
  }

  onDown(event) {
    pointAt(this.under(event), this);
    // A finger that moves reads values, and the buttons above zoom.
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    event.preventDefault();
    this.svg.focus({ preventScroll: true });
    const start = this.under(event);
    this.drag = element("rect", {
      class: "selection",
      y: PAD.top,
      height: this.edges.bottom - PAD.top,
    });
    this.svg.append(this.drag);
    const onMove = (moved) => {
      const [from, to] = [start, this.under(moved)].map(this.x).sort((a, b) => a - b);
      this.drag.setAttribute("x", from);
      this.drag.setAttribute("width", to - from);
      pointAt(this.under(moved), this);
    };
    const onUp = (ended) => {
      removeEventListener("pointermove", onMove);
      removeEventListener("pointerup", onUp);
      this.drag.remove();
      this.drag = null;
      const [from, to] = [start, this.under(ended)].sort((a, b) => a - b);
      if (this.x(to) - this.x(from) > 6) zoom([from, to]);
    };
    addEventListener("pointermove", onMove);
    addEventListener("pointerup", onUp);
  }

  onKey(event) {
    const { low, high } = this.edges,
      at = view.at ?? (low + high) / 2;
    const by = { ArrowLeft: -0.01, ArrowRight: 0.01 }[event.key];
    if (by) pointAt(clamp(at + by * (high - low) * (event.shiftKey ? 10 : 1), low, high), this);
    else if (event.key === "Home" || event.key === "End")
      pointAt(event.key === "Home" ? low : high, this);
    else if (event.key === "+" || event.key === "=") zoomBy(0.5);
    else if (event.key === "-") zoomBy(2);
    else if (event.key === "0" || event.key === "Escape") zoom(null);
    else return;
    event.preventDefault();
  }

  /** Draw the crosshair at a place, and with `tip` the values there. */
  point(place, tip) {
    this.cross?.replaceChildren();
    this.tip.hidden = true;
    if (place === null || !this.shown?.length) return;
    const { bottom } = this.edges,
      x = Math.round(this.x(place)) + 0.5;
    this.cross.append(
      element("line", { class: "crosshair", x1: x, x2: x, y1: PAD.top, y2: bottom }),
    );
    const rows = [];
    for (const { places, curve, color, label, error, kind } of this.shown) {
      // Of many runs the smoothed training losses would only crowd the rest.
      if (kind === "pale" && view.runs.length > 3) continue;
      if (
        !places.length ||
        (!(place >= places[0] - 1e-9) && places.length > 1 && kind !== "points")
      )
        continue;
      let i = lastBelow(places, place);
      if (i + 1 < places.length && places[i + 1] - place < place - places[i]) i++;
      const y = this.y(curve.y[i]);
      if (y >= PAD.top && y <= bottom)
        this.cross.append(
          element("circle", {
            cx: this.x(places[i]),
            cy: y,
            r: 3.5,
            style: { fill: color, stroke: "var(--panel)", "stroke-width": 1.5 },
          }),
        );
      const deviation = error && error[i] ? ` ± ${this.format(error[i])}` : "";
      const away = kind === "points" ? ` at ${curve.x[i].toLocaleString("en")}` : "";
      rows.push(
        element(
          "div",
          { class: "row" },
          element("span", {
            class: `swatch ${kind === "line" || kind === "points" ? "" : "faint"}`,
            style: { color },
          }),
          element("span", {}, label + away),
          element("span", {}, this.format(curve.y[i]) + deviation),
        ),
      );
    }
    if (!tip || !rows.length) return;
    this.tip.replaceChildren(element("b", {}, describe(this.shown[0].run, place)), ...rows);
    this.tip.hidden = false;
    const [box, svg] = [this.box, this.svg].map((part) => part.getBoundingClientRect());
    const at = svg.left - box.left + x,
      room = this.tip.offsetWidth,
      right = at + 14 + room < box.width;
    const left = clamp(right ? at + 14 : at - 14 - room, 4, Math.max(box.width - room - 4, 4));
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${svg.top - box.top + PAD.top + 4}px`;
  }
}
