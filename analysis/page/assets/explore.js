// The explorer of a task: what is drawn, how it is coloured, which levels are hidden; its table of runs filters it.

function about(task, run) {
  return { signature: run.signature, run: named(run), status: run.status, final: finalText(task, run) };
}

function explorer(task, root) {
  const state = { curve: 0, colouring: task.default, hidden: new Set(), bands: false, across: 0 };
  state.curvesLog = spansDecades(task.curves[0]);
  state.finalLog = false;
  const table = tables.get(document.querySelector(`[data-runs="${root.dataset.task}"] table`));
  let seen = false;

  const choose = (label, options, name, changed = update) => {
    const select = make("select", { "aria-label": label }, ...options.map((text, at) => make("option", { value: at, textContent: text })));
    select.value = state[name];
    select.addEventListener("change", () => {
      state[name] = Number(select.value);
      changed();
    });
    return make("label", {}, `${label} `, select);
  };
  const tick = (label, name) => {
    const box = make("input", { type: "checkbox", checked: state[name] });
    box.addEventListener("change", () => {
      state[name] = box.checked;
      update();
    });
    return make("label", {}, box, ` ${label}`);
  };

  const legend = make("fieldset", { className: "legend" });
  const curvePlace = make("div", { className: "chart" });
  const pointPlace = make("div", { className: "chart" });
  const curveWords = make("figcaption");
  const pointWords = make("figcaption");
  const names = task.colourings.map((each) => each.name);

  function recolour() {
    state.hidden.clear();
    const { name, levels, colours } = task.colourings[state.colouring];
    const boxes = levels.map((level, at) => {
      const box = make("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => {
        if (box.checked) state.hidden.delete(at);
        else state.hidden.add(at);
        update();
      });
      return make("label", {}, box, swatch(colours[at]), level);
    });
    const all = (checked) => () => {
      levels.forEach((_, at) => {
        boxes[at].firstElementChild.checked = checked;
        if (checked) state.hidden.delete(at);
        else state.hidden.add(at);
      });
      update();
    };
    const buttons = [["all", true], ["none", false]].map(([text, checked]) => {
      const button = make("button", { type: "button", textContent: text });
      button.addEventListener("click", all(checked));
      return button;
    });
    legend.replaceChildren(make("legend", { textContent: `${name}: tick what is shown` }), ...boxes, ...buttons);
    update();
  }

  /** The indices of the runs that neither the legend nor the table's filter hides. */
  function shown() {
    const filtered = table
      ? new Set(table.rows({ search: "applied" }).nodes().toArray().map((row) => row.querySelector("a").id.slice(RUN.length)))
      : null;
    return task.runs.flatMap((run, at) =>
      !state.hidden.has(run.levels[state.colouring]) && (!filtered || filtered.has(run.signature)) ? [at] : [],
    );
  }

  function update() {
    if (!seen) return;
    const kept = shown();
    const colouring = task.colourings[state.colouring];
    const across = task.colourings[state.across];
    const row = (at) => {
      const run = task.runs[at];
      const level = run.levels[state.colouring];
      return { ...about(task, run), level: colouring.levels[level], colour: colouring.colours[level] };
    };
    const counted = `${kept.length} of ${task.runs.length} runs`;
    const curve = task.curves[state.curve];
    if (curve) {
      const rows = kept.map((at) => curveRow(curve, at, row(at))).filter(Boolean);
      const lines = state.bands ? "median and range of each colour" : "one line a run";
      const mean = curve.mean_of > 1 ? ` A point is the mean of ${curve.mean_of} recorded values.` : "";
      const alternative = `${capital(curve.name)} over the step, ${lines}, coloured by ${colouring.name}; ${counted}`;
      const ended = rows.some((each) => each.status === "diverged") ? "; × ends a diverged run" : "";
      curveWords.textContent = `${alternative}${ended}.${mean} Point at a line to see which run it is; click to open it.`;
      draw(curvePlace, {
        chart: `curves-${state.curvesLog ? "log" : "linear"}`,
        rows: state.curvesLog ? rows.map(positive) : rows,
        signals: { bands: state.bands },
        alternative,
        click: openRun,
      });
    }
    const alternative = `Final ${task.metric} over ${across.name}, a point a run, coloured by ${colouring.name}; ${counted}`;
    const lost = kept.filter((at) => task.runs[at].value === null).length;
    pointWords.textContent = `${alternative}${lost ? `; × at the edge: ${lost} without a final value` : ""}.`;
    draw(pointPlace, {
      chart: `${across.numbers ? "numbers" : "runs"}-${state.finalLog ? "log" : "linear"}`,
      rows: kept.map((at) => {
        const level = task.runs[at].levels[state.across];
        return { ...row(at), value: task.runs[at].value, x: across.numbers?.[level] ?? across.levels[level] };
      }),
      signals: { higher_is_better: task.higher_is_better },
      alternative,
      click: openRun,
    });
  }

  const ofCurves = [
    choose("Curve", task.curves.map((curve) => curve.name), "curve"),
    tick("median and range", "bands"),
    tick("logarithmic", "curvesLog"),
  ];
  const any = task.curves.length > 0;
  root.append(
    make("div", { className: "controls" }, choose("Colour", names, "colouring", recolour), ...(any ? ofCurves : [])),
    legend,
    ...(any ? [make("figure", {}, curvePlace, curveWords)] : []),
    make("div", { className: "controls" }, choose("Final values over", names, "across"), tick("logarithmic", "finalLog")),
    make("figure", {}, pointPlace, pointWords),
    note("Dragging a figure moves it, pinching or the wheel with Ctrl zooms, a double click shows all of it again."),
  );
  root.hidden = false;
  recolour();
  table?.on("draw", update);
  whenSeen(root, () => {
    seen = true;
    update();
  });
}

/** Whether a linear axis would show little of a curve: where its values are positive and span a ratio of 8 or more. */
function spansDecades(curve) {
  const values = (curve?.lines ?? []).flatMap((line) => line?.[1] ?? []);
  const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, 0]);
  return low > 0 && high / low >= 8;
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

/** A curve without what a logarithmic axis cannot show. */
function positive(row) {
  const kept = row.values.map((value, at) => [row.steps[at], value]).filter(([, value]) => value > 0);
  return { ...row, steps: kept.map(([step]) => step), values: kept.map(([, value]) => value) };
}

if (report) {
  for (const root of document.querySelectorAll(".explorer")) explorer(report.tasks[root.dataset.task], root);
  for (const table of document.querySelectorAll("[data-runs] tbody")) {
    table.addEventListener("click", (event) => {
      const link = event.target.closest("tr")?.querySelector("a");
      if (!link) return;
      event.preventDefault();
      openRun(link.id.slice(RUN.length));
    });
  }
  runWindow();
}
