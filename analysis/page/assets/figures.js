// Figures: the charts of the data, drawn in a place of the page, and drawn anew when their rows or switches change.

const report = document.getElementById("explore-data") ? JSON.parse(await unpacked("explore-data")) : null;
let library = null; // the module, from the first figure on

/** An element with properties, attributes where their names have a dash, and children. */
function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

const ERRORS = 1; // Vega's level: a layer without rows is no reason for a warning

/** Draws a chart where `place` is, after what was asked for before; `alternative` says in words what it shows. */
function draw(place, { chart, rows, signals = {}, alternative, click = null }) {
  const pending = (place.pending ?? Promise.resolve()).then(async () => {
    if (place.chart !== chart) {
      await (library ??= unpackedModule("figures-library"));
      place.view?.finalize();
      const filled = { ...report.charts[chart], datasets: { rows } };
      const { view } = await vegaEmbed(place, filled, { actions: false, renderer: "svg", logLevel: ERRORS });
      if (click) view.addEventListener("click", (_, item) => item?.datum?.signature && click(item.datum.signature));
      Object.assign(place, { view, chart });
    }
    for (const [name, value] of Object.entries(signals)) place.view.signal(name, value);
    await place.view.data("rows", rows).resize().runAsync(); // resize: the labels of the axes may be wider now
    place.setAttribute("role", "img"); // Vega's own words say less, and of each mark nothing that the tables do not say
    place.setAttribute("aria-label", alternative);
    place.removeAttribute("aria-roledescription");
    place.dataset.rows = rows.length; // that it is drawn, and with how many rows
  });
  place.pending = pending.catch((error) => console.error(error));
}

/** Calls `first` once, when the place comes near the window: what nobody scrolls to costs nothing. */
function whenSeen(place, first) {
  const observer = new IntersectionObserver(
    (entries) => {
      if (entries.some((entry) => entry.isIntersecting)) {
        observer.disconnect();
        first();
      }
    },
    { rootMargin: "300px" },
  );
  observer.observe(place);
}

/** The row of one run for the charts of curves; null where it has no such curve. */
function curveRow(curve, index, more) {
  const line = curve.lines[index];
  if (!line) return null;
  const [at, values] = line;
  const steps = curve.steps[at].slice(0, values.length);
  const ended = more.status === "diverged" ? { end_step: steps.at(-1), end_value: values.at(-1) } : {};
  return { ...more, ...ended, steps, values };
}

/** A text for a cell; a dash where there is nothing. */
function cell(text) {
  return text === null || text === undefined || text === "" ? "–" : String(text);
}

/** What a tooltip says of a run. */
function named(run) {
  return `${run.arm}, seed ${run.seed}`;
}

function finalText(task, run) {
  return run.value === null ? "–" : `${task.metric} ${run.value}`;
}
