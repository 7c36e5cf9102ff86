// One run: what it is, how it ended, its curves among its arm's, its telemetry, and the command that repeats it.
// It opens by its address, #run-SIGNATURE, so that it can be linked to and the browser's Back closes it.

const RUN = "run-";
const DEFINITION = "_definition"; // of a format, whose name says it

/** The window in which a run is shown; it is in the page once. */
function runWindow() {
  const title = make("h2", { id: "run-title" });
  const content = make("div", { className: "run-content" });
  const close = make("button", { type: "button", textContent: "Close" });
  const dialog = make(
    "dialog",
    { className: "run", "aria-labelledby": "run-title" },
    make("div", { className: "run-head" }, title, close),
    content,
  );
  document.body.append(dialog);
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    if (location.hash.startsWith(`#${RUN}`)) history.replaceState(null, "", location.pathname + location.search);
  });
  const show = () => {
    const signature = location.hash.startsWith(`#${RUN}`) ? location.hash.slice(RUN.length + 1) : null;
    const task = report.tasks.find((each) => each.runs.some((run) => run.signature === signature));
    if (!task) {
      dialog.close();
      return;
    }
    const index = task.runs.findIndex((run) => run.signature === signature);
    title.textContent = named(task.runs[index]);
    content.replaceChildren(...runParts(task, index));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  };
  window.addEventListener("popstate", show);
  window.addEventListener("run", show);
  show();
}

/** Opens a run without moving the page, which the address's anchor would do. */
function openRun(signature) {
  history.pushState(null, "", `#${RUN}${signature}`);
  window.dispatchEvent(new Event("run"));
}

function runParts(task, index) {
  const run = task.runs[index];
  return [
    make("h3", { textContent: "Outcome" }),
    plainTable(["what", "value"], outcome(run)),
    make("h3", { textContent: "Settings" }),
    ...settings(task, index),
    make("h3", { textContent: "Curves" }),
    ...runCurves(task, index),
    ...runTelemetry(task, run),
    make("h3", { textContent: "Run it again" }),
    ...repeat(run),
  ];
}

function outcome(run) {
  const rows = [
    ["signature, the name of its folder", run.signature],
    ["status", run.status],
    ["steps", run.step],
  ];
  if (run.cause) rows.push(["cause", run.cause]);
  rows.push(...run.final);
  if (run.seconds !== null) rows.push(["time", `${run.seconds} s`]);
  if (run.sessions > 1) rows.push(["sessions", `${run.sessions}: it was interrupted and resumed`]);
  return rows;
}

/** The settings in which the run differs from the rest of its arm, then from the first arm, then all of them. */
function settings(task, index) {
  const run = task.runs[index];
  const first = task.runs[0];
  const arm = task.runs.filter((each) => each.arm === run.arm);
  const own = [];
  const ofArm = [];
  task.columns.forEach((name, at) => {
    const mine = run.settings[at];
    const others = [...new Set(arm.map((each) => each.settings[at]))].filter((value) => value !== mine);
    if (others.length) own.push([name, mine, others.join(", ")]);
    else if (mine !== first.settings[at]) ofArm.push([name, mine, first.settings[at]]);
  });
  const known = new Set(ofArm.map(([name]) => name));
  const telling = ofArm.filter(([name]) => !(name.endsWith(DEFINITION) && known.has("format")));
  const parts = [];
  if (own.length) {
    parts.push(note(`What tells it from the other ${arm.length - 1} of its arm, ${run.arm}:`));
    parts.push(plainTable(["setting", "this run", "the others"], own));
  } else parts.push(note(`It is the only run of its arm, ${run.arm}.`));
  if (run.arm === first.arm) parts.push(note("Its arm is the first of the grid."));
  else {
    parts.push(note(`What tells its arm from the first, ${first.arm}:`));
    parts.push(plainTable(["setting", "this arm", "the first"], telling));
  }
  const all = [...task.constant, ...task.columns.map((name, at) => [name, run.settings[at]])];
  const folded = make("details", {}, make("summary", { textContent: `All ${all.length} settings` }));
  folded.append(plainTable(["setting", "value"], all.sort(([a], [b]) => a.localeCompare(b))));
  return [...parts, folded];
}

function runCurves(task, index) {
  const run = task.runs[index];
  const arm = task.runs.flatMap((each, at) => (each.arm === run.arm ? [at] : []));
  const [colour, others] = [task.colourings[0].colours[run.levels[0]], "currentColor"];
  const drawn = task.curves.filter((curve) => curve.lines[index]);
  if (!drawn.length) return [note("It recorded no curve.")];
  const parts = drawn.map((curve) => {
    const place = make("div", { className: "chart" });
    const rows = arm
      .map((at) => curveRow(curve, at, { ...about(task, task.runs[at]), colour: at === index ? colour : others, mine: at === index }))
      .filter(Boolean);
    const alternative = `${capital(curve.name)} of this run over its ${run.step} steps, and of the others of its arm`;
    whenSeen(place, () => draw(place, { chart: "small", rows, alternative }));
    return make("figure", {}, make("figcaption", { textContent: capital(curve.name) }), place);
  });
  const thinned = Math.max(...drawn.map((curve) => curve.mean_of));
  const words = ["The coloured line is this run, the grey ones are the others of its arm."];
  if (thinned > 1) words.push(`Of long curves a point is the mean of up to ${thinned} recorded values.`);
  return [note(words.join(" ")), make("div", { className: "small-charts" }, ...parts)];
}

function runTelemetry(task, run) {
  if (run.observed === undefined) return [];
  const parts = [make("h3", { textContent: "Telemetry" })];
  parts.push(note(run.origin ? `The first NaN or Inf: ${run.origin}.` : "No NaN and no Inf was seen."));
  if (run.gradient) {
    const [cosine, ratio, parameter, lowest] = run.gradient;
    const least = parameter ? ` The lowest, ${cell(lowest)}, is that of ${parameter}.` : "";
    parts.push(note(`Gradient against full precision: cosine ${cell(cosine)}, norm ratio ${cell(ratio)}.${least}`));
  }
  if (run.roles?.length) {
    const place = make("div", { className: "chart" });
    const colours = report.colours;
    const rows = run.roles.map(([level, steps, values], at) => ({ level, steps, values, colour: colours[at % colours.length] }));
    const legend = make("ul", { className: "legend" });
    legend.append(...rows.map((row) => make("li", {}, swatch(row.colour), row.level)));
    const alternative = "Signal to rounding noise (dB) over the sampled steps, the median over sites, a line a role";
    whenSeen(place, () => draw(place, { chart: "by-role", rows, alternative }));
    parts.push(make("figure", {}, make("figcaption", { textContent: `${alternative}.` }), legend, place));
  }
  if (run.rounded?.length) {
    const most = run.operands > run.rounded.length ? `, the ${run.rounded.length} of the lowest SQNR of ${run.operands}` : "";
    parts.push(note(`What was rounded, medians over the sampled steps${most}:`));
    const shares = (value) => (value === null ? "–" : `${(100 * value).toFixed(2)}%`);
    parts.push(
      plainTable(
        ["site, role → format", "SQNR (dB)", "clipped", "underflowed", "swallowed"],
        run.rounded.map(([at, sqnr, ...rest]) => [task.operands[at], cell(sqnr), ...rest.map(shares)]),
      ),
    );
  }
  return parts;
}

function repeat(run) {
  if (!run.command) return [note("grid.json does not say how the grid was run.")];
  const copy = make("button", { type: "button", textContent: "Copy the command" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(run.command);
    copy.textContent = "Copied";
  });
  return [
    note(
      "Where the grid was run: the first half sets the run's folder aside, so nothing is lost; the second is the grid's " +
        "own command, which skips every run that is done and so runs this one anew. The same version of the code gives " +
        "the same numbers.",
    ),
    make("pre", { tabIndex: 0, textContent: run.command }),
    copy,
  ];
}

function plainTable(headings, rows) {
  const head = make("tr", {}, ...headings.map((text) => make("th", { scope: "col", textContent: text })));
  const body = rows.map((row) => make("tr", {}, ...row.map((text) => make("td", { textContent: cell(text) }))));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { className: "box wrapped", tabIndex: 0, role: "region", "aria-label": headings.join(", ") }, table);
}

function note(text) {
  return make("p", { className: "note", textContent: text });
}

function swatch(colour) {
  const made = make("span", { className: "swatch" });
  made.style.background = colour;
  return made;
}
