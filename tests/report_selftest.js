// What a reader does, done to a report by a script, which tells the page around what came of it.
(() => {
  const found = { errors: window.seenErrors, width: innerWidth };
  const all = (selector) => [...document.querySelectorAll(selector)];
  const charts = all(".chart").filter((chart) => chart.querySelector("svg[tabindex]"));
  const [chart] = charts,
    svg = chart.querySelector("svg"),
    tip = chart.querySelector(".tip");
  const labels = () => [...chart.querySelectorAll("svg text")].map((text) => text.textContent);
  const at = (share) => {
    const frame = svg.getBoundingClientRect();
    return { clientX: frame.left + frame.width * share, clientY: frame.top + 60, bubbles: true };
  };
  const pointer = (type, share, target = svg, pointerType = "mouse") =>
    target.dispatchEvent(new PointerEvent(type, { ...at(share), pointerType, button: 0 }));
  const path = () => svg.querySelector("path.curve")?.getAttribute("d");
  const press = (key) => svg.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const button = (words) => all("button").find((each) => each.textContent === words);

  found.title = document.querySelector("h1").textContent;
  found.charts = charts.length;
  found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  found.resources = performance.getEntriesByType("resource").map((entry) => entry.name);
  found.injected = typeof window.injected;

  pointer("pointermove", 0.5);
  found.hover = tip.hidden ? "" : tip.textContent;
  const [inner, outer] = [tip, chart].map((part) => part.getBoundingClientRect());
  found.tipInside =
    inner.left >= outer.left &&
    inner.right <= outer.right &&
    inner.top >= svg.getBoundingClientRect().top;
  found.crosshairs = all(".crosshair").length;
  pointer("pointerleave", 0.5);
  found.afterLeaving = tip.hidden;
  pointer("pointerdown", 0.4, svg, "touch");
  found.tap = tip.hidden ? "" : tip.textContent;

  found.labels = labels();
  found.linear = path();
  pointer("pointerdown", 0.4);
  pointer("pointermove", 0.7, window);
  pointer("pointerup", 0.7, window);
  found.zoomed = labels();
  found.resetEnabled = !document.querySelector("#reset").disabled;
  svg.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
  found.afterReset = labels();
  press("+");
  found.zoomedByKey = labels();
  press("0");
  press("ArrowRight");
  found.readByKey = tip.hidden ? "" : tip.textContent;

  button("tokens").click();
  found.tokens = labels();
  button("training time").click();
  found.time = labels();
  button("steps").click();
  chart.querySelector("button.log").click();
  found.logarithmic = path();
  chart.querySelector("button.log").click();
  const curves = () => svg.querySelectorAll("path.curve").length;
  found.curves = curves();
  chart.querySelector(".legend button")?.click();
  found.curvesWithOneHidden = curves();

  const slider = document.querySelector("input[type=range]");
  if (slider) {
    found.samples = all(".sample pre").map((each) => each.textContent);
    slider.value = 0;
    slider.dispatchEvent(new Event("input"));
    found.firstSamples = all(".sample pre").map((each) => each.textContent);
  }
  const piece = document.querySelector(".passage .piece");
  if (piece) {
    found.passage = all(".passage .piece").map((each) => each.textContent);
    piece.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    found.token = document.querySelector(".passage .tip").textContent;
  }
  parent.postMessage(JSON.stringify(found), "*");
})();
