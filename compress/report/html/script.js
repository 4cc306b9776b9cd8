// Draws the plots from the JSON of the page, and lets columns be sorted. Names come escaped for Plotly.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  // Six colours, seven marks, five dashes: numbers that share no factor, so that neighbours differ in all three,
  // and 210 rows pass before the three come together again.
  const COLORS = page.colors;
  const MARKS = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star"];
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const byId = (id) => document.getElementById(id);
  const shown = new Set(page.rows.keys());
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const originals = page.rows.flatMap((row, i) => (row.original ? [i] : []));

  function look(i) {
    const row = page.rows[i];
    // An original is no colour among others.
    if (row.original) {
      const symbol = ["hexagon2", "hourglass", "bowtie", "pentagon"][originals.indexOf(i) % 4];
      return { color: style("--text"), symbol, dash: "solid" };
    }
    return { color: COLORS[i % 6], symbol: MARKS[i % 7], dash: DASHES[i % 5] };
  }

  // Paper has a width of its own, which the window does not know: see style.css.
  function paper(place) {
    if (!matchMedia("print").matches) return { autosize: true };
    return { width: place.matches(":only-child, #predicted") ? 1020 : 505, height: 400 };
  }

  function themed(place, layout) {
    const axis = { gridcolor: style("--line"), linecolor: style("--line"), zerolinecolor: style("--line") };
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: style("--text"), size: 12, family: "system-ui, sans-serif" },
      margin: { l: 70, r: 20, t: 50, b: 60 },
      height: 430,
      hoverlabel: { align: "left", bgcolor: style("--back"), font: { color: style("--text"), size: 11 } },
      legend: { orientation: "h", y: -0.22 },
      hovermode: "closest",
    };
    const title = { ...layout.title, font: { size: 14 }, x: 0.02, xanchor: "left" };
    const whole = { ...base, ...layout, ...paper(place), title };
    const axes = Object.keys(layout).filter((name) => /^[xy]axis/.test(name));
    for (const name of new Set(["xaxis", "yaxis", ...axes])) {
      whole[name] = { ...axis, ...layout[name] };
      if (whole[name].type === "log") Object.assign(whole[name], { dtick: "D2", tickformat: "~g" });
      if (whole[name].title) whole[name].title = { standoff: 12, ...whole[name].title };
    }
    return whole;
  }

  function draw(place, data, layout, absent) {
    if (!data.length) {
      Plotly.purge(place);
      delete place.dataset.clicks;
      place.classList.add("empty");
      place.textContent = absent;
      return;
    }
    if (place.classList.contains("empty")) place.textContent = "";
    place.classList.remove("empty");
    Plotly.react(place, data, themed(place, layout), CONFIG);
    if (!place.dataset.clicks) {
      place.dataset.clicks = "yes";
      place.on("plotly_click", (event) => {
        const found = event.points[0].data.meta;
        const details = byId(`run-${found}`);
        if (details) {
          details.open = true;
          details.scrollIntoView();
        }
      });
    }
  }

  function choices(id, names, redraw) {
    const select = byId(`choose-${id}`);
    names.forEach((name, i) => select.add(new Option(unescaped(name), i)));
    if (names.length < 2) select.disabled = true;
    select.addEventListener("change", redraw);
    return () => Number(select.value);
  }

  // Titles come with entities for Plotly.
  function unescaped(text) {
    return text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  }

  function bars(measure, i, color) {
    const [value, low, high] = [measure.values[i], measure.low[i], measure.high[i]];
    if (low === null || high === null) return undefined;
    return {
      type: "data", symmetric: false, array: [high - value], arrayminus: [value - low],
      color, thickness: 1, width: 3,
    };
  }

  const rowsOf = (measures) =>
    [...page.rows.keys()].filter((i) => shown.has(i) && measures.every((m) => m.values[i] !== null));

  // The candidates of one model that no other one beats in both figures, from left to right.
  function front(x, y, rows) {
    const sign = (measure, i) => (measure.less ? 1 : -1) * measure.values[i];
    const beats = (a, b) =>
      sign(x, a) <= sign(x, b) && sign(y, a) <= sign(y, b) &&
      (sign(x, a) < sign(x, b) || sign(y, a) < sign(y, b));
    const best = rows.filter((i) => !rows.some((j) => beats(j, i)));
    return best.sort((a, b) => x.values[a] - x.values[b]);
  }

  function scatter(place, x, y, title, absent) {
    const rows = rowsOf([x, y]);
    const drawn = rows.filter((i) => !(y.log && !(y.values[i] > 0)));
    const data = originals.flatMap((original, index) => {
      const own = drawn.filter((i) => page.rows[i].model === page.rows[original].model);
      const best = front(x, y, own.filter((i) => !page.rows[i].original));
      if (!best.length) return [];
      const line = { color: style("--quiet"), width: 1.5, dash: DASHES[index % 5] };
      return [{
        type: "scatter", mode: "lines", hoverinfo: "skip", line, showlegend: false, name: "front",
        x: best.map((i) => x.values[i]), y: best.map((i) => y.values[i]),
      }];
    });
    for (const i of drawn) {
      const { color, symbol } = look(i);
      data.push({
        type: "scatter", mode: "markers+text", meta: i, showlegend: false, name: String(i),
        x: [x.values[i]], y: [y.values[i]], text: [String(i)], textposition: "top right",
        textfont: { size: 10 }, customdata: [page.rows[i].hover],
        marker: { color, symbol, size: 11, line: { color: style("--back"), width: 1 } },
        error_x: bars(x, i, color), error_y: bars(y, i, color),
        hovertemplate: `${x.title}: %{x}<br>${y.title}: %{y}<br>%{customdata}<extra></extra>`,
      });
    }
    const type = y.log ? "log" : "linear";
    const floors = y.log ? originals.filter((i) => shown.has(i) && y.values[i] > 0) : [];
    const shapes = floors.map((i, index) => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: y.values[i], y1: y.values[i],
      line: { color: style("--quiet"), width: 1, dash: "dot" },
      label: {
        text: `${i}: noise floor of 16 bits`, textposition: ["start", "middle", "end"][index % 3], font: { size: 10 },
      },
    }));
    draw(place, rows.length ? data : [], {
      title: { text: title }, shapes,
      xaxis: { title: { text: x.title } },
      yaxis: { title: { text: y.title }, type, automargin: true },
    }, absent);
  }

  function line(i, x, y, more) {
    const { color, symbol, dash } = look(i);
    return {
      type: "scatter", mode: "lines+markers+text", meta: i, showlegend: false, x, y, name: `${i}`,
      text: x.map((_, k) => (k === x.length - 1 ? String(i) : "")), textposition: "middle right",
      textfont: { size: 10, color }, cliponaxis: false, line: { color, dash }, marker: { color, symbol, size: 8 },
      customdata: x.map(() => page.rows[i].hover),
      hovertemplate: "%{x}: %{y}<br>%{customdata}<extra></extra>", ...more,
    };
  }

  const keys = Object.keys(page.points);
  // What a row measured of the same engine and device as the chosen point, and that is like it in this.
  function series(i, like, fixed) {
    return keys
      .map((key) => page.points[key][i])
      .filter((point) => point && ["of", ...fixed].every((name) => point[name] === like[name]));
  }

  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  function drawSpeed() {
    const chosen = page.points[keys[at()]] ?? [];
    const like = chosen.find((point) => point);
    const rows = [...shown];
    const over = (name, title, points, along, value, iqr, label, unit) => {
      const data = rows.flatMap((i) => {
        const found = like ? points(i) : [];
        if (!found.length) return [];
        const { color } = look(i);
        const x = [...new Set(found.map((point) => point[along]))].sort((a, b) => a - b);
        // The same length in may come with several lengths out: their mean.
        const means = (of) => x.map((at) => mean(found.filter((p) => p[along] === at).map((p) => p[of] ?? 0)));
        const error = { type: "data", array: means(iqr).map((width) => width / 2), color, thickness: 1 };
        return [line(i, x, means(value), { error_y: error })];
      });
      draw(byId(name), data, {
        title: { text: title }, xaxis: { title: { text: label } }, yaxis: { title: { text: unit }, rangemode: "tozero" },
      }, "Nothing of this was measured.");
    };
    over("throughput", `Throughput, ${like?.pattern} tokens in/out`, (i) => series(i, like, ["pattern"]), "batch",
      "tokens_per_s", "tokens_per_s_iqr", "batch size", "tokens/s of the batch");
    // A mix has no length.
    over("ttft", `Time to the first token, batch ${like?.batch}`,
      (i) => series(i, like, ["batch"]).filter((point) => !point.mix), "input_length",
      "ttft_ms", "ttft_ms_iqr", "tokens in", "ms");
    const of = (i) => chosen[i];
    const positions = rows.flatMap((i) => {
      const found = of(i)?.itl_by_position;
      if (!found) return [];
      const thin = { mode: "lines", line: { ...line(i, [], []).line, width: 1 }, opacity: 0.5 };
      return [
        line(i, found.positions, found.p50_ms, { mode: "lines+text" }),
        line(i, found.positions, found.p90_ms, thin),
      ];
    });
    draw(byId("itl"), positions, {
      title: { text: "Time between tokens by position (thin: 90th percentile)" },
      xaxis: { title: { text: "position of the token" } }, yaxis: { title: { text: "ms" }, rangemode: "tozero" },
    }, "No run kept the time between tokens by position.");
    const totals = rows.flatMap((i) => {
      const found = of(i)?.e2e_ms;
      if (!found) return [];
      const { color, symbol } = look(i);
      return [{
        type: "box", meta: i, name: String(i), y: found, boxpoints: "all", showlegend: false,
        line: { color }, marker: { color, symbol, size: 4 }, pointpos: 0, jitter: 0.4,
        // The quartiles that ± is half the range of.
        quartilemethod: "inclusive",
      }];
    });
    draw(byId("total"), totals, {
      title: { text: "Total time of a request" },
      xaxis: { title: { text: "run" }, type: "category" }, yaxis: { title: { text: "ms" }, rangemode: "tozero" },
    }, "No run kept the total time of its requests.");
  }

  function drawPredicted() {
    const panels = [["itl_ms", "ITL, ms"], ["ttft_ms", "TTFT, ms"], ["tokens_per_s", "tokens/s"]];
    const data = [];
    const layout = { title: { text: "Predicted beside measured (on the line: as predicted)" }, shapes: [] };
    layout.grid = { rows: 1, columns: panels.length, pattern: "independent" };
    panels.forEach(([name, title], k) => {
      const [x, y] = [`x${k ? k + 1 : ""}`, `y${k ? k + 1 : ""}`];
      const pairs = [...shown].flatMap((i) => {
        const found = page.predicted[i];
        const pair = found && [found.said[name], found.measured[name]];
        return pair && pair.every((value) => value != null) ? [[i, ...pair]] : [];
      });
      for (const [i, said, measured] of pairs) {
        data.push(line(i, [said], [measured], {
          mode: "markers+text", xaxis: x, yaxis: y,
          hovertemplate: `${title}: predicted %{x}, measured %{y}<br>%{customdata}<extra></extra>`,
        }));
      }
      const most = Math.max(0, ...pairs.flatMap(([, ...pair]) => pair)) * 1.1;
      const axis = { range: [0, most || 1] };
      layout[`xaxis${k ? k + 1 : ""}`] = { ...axis, title: { text: `${title}, predicted` } };
      layout[`yaxis${k ? k + 1 : ""}`] = { ...axis, title: { text: k ? "" : "measured" } };
      layout.shapes.push({
        type: "line", xref: x, yref: y, x0: 0, y0: 0, x1: most, y1: most,
        line: { color: style("--quiet"), dash: "dot", width: 1 },
      });
    });
    draw(byId("predicted"), data, layout, "No run has a prediction of its speed.");
  }

  const texts = [...new Set(page.blocks.flatMap((found) => Object.keys(found ?? {})))];
  function drawBlocks() {
    const data = [...shown].flatMap((i) => {
      const found = page.blocks[i]?.[texts[text()]];
      return found ? [line(i, [...found.keys()], found)] : [];
    });
    draw(byId("block-kl"), data, {
      title: { text: "KL of each block alone in the original" },
      xaxis: { title: { text: "block" } }, yaxis: { title: { text: "KL, nats per token" }, type: "log", automargin: true },
    }, "No run measured its blocks one by one.");
  }

  function drawFigures(root) {
    for (const place of root.querySelectorAll("[data-figure]")) {
      const found = page.figures[place.dataset.run][Number(place.dataset.figure)];
      draw(place, found.data, found.layout, "");
    }
  }

  const y = choices("y", page.accuracy.map((m) => m.title), drawAccuracy);
  const x = choices("x", page.size.map((m) => m.title), drawAccuracy);
  const point = choices("point", keys, drawAccuracy);
  const rate = choices("rate", ["over the original's", "tokens/s"], drawAccuracy);
  const at = choices("at", keys, drawSpeed);
  const text = choices("text", texts, drawBlocks);

  function drawAccuracy() {
    const [bySize, bySpeed] = [byId("by-size"), byId("by-speed")];
    const accuracy = page.accuracy[y()];
    const speeds = page.speed[keys[point()]];
    if (!accuracy) {
      for (const place of [bySize, bySpeed]) draw(place, [], {}, "No accuracy was measured.");
      return;
    }
    scatter(bySize, page.size[x()], accuracy, "Accuracy against size", "Nothing to show.");
    // Of the two measures of speed the ratio comes second.
    if (!speeds) draw(bySpeed, [], {}, "No speed was measured.");
    else scatter(bySpeed, speeds[1 - rate()], accuracy, "Accuracy against decode speed", "No speed was measured there.");
  }

  function drawAll() {
    drawAccuracy();
    drawSpeed();
    drawPredicted();
    drawBlocks();
    for (const details of document.querySelectorAll("details.run[open]")) drawFigures(details);
    for (const place of document.querySelectorAll("[data-extra]")) {
      const found = page.extra[Number(place.dataset.extra)];
      draw(place, found.data, found.layout, "");
    }
  }

  const PATHS = {
    circle: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z", square: "M-5,-5H5V5H-5Z", diamond: "M0,-6L6,0L0,6L-6,0Z",
    "triangle-up": "M0,-6L6,5H-6Z", "triangle-down": "M0,6L6,-5H-6Z",
    cross: "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    star: "M0,-7L1.8,-2.3L6.7,-2.2L2.8,0.9L4.1,5.7L0,2.9L-4.1,5.7L-2.8,0.9L-6.7,-2.2L-1.8,-2.3Z",
    hexagon2: "M-6,0L-3,-5H3L6,0L3,5H-3Z", hourglass: "M-5,-5H5L-5,5H5Z", bowtie: "M-5,-5V5L5,-5V5Z",
    pentagon: "M0,-6L6,-1.5L3.5,5H-3.5L-6,-1.5Z",
  };
  const WIDTHS = { solid: "", dash: "6 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "10 5" };
  function drawKeys() {
    for (const place of document.querySelectorAll("[data-key]")) {
      const { color, symbol, dash } = look(Number(place.dataset.key));
      place.innerHTML =
        `<svg viewBox="-17 -11 34 22" aria-hidden="true"><line x1="-16" x2="16" stroke="${color}" ` +
        `stroke-width="2" stroke-dasharray="${WIDTHS[dash]}"/><path d="${PATHS[symbol]}" fill="${color}"/></svg>`;
    }
  }

  const theme = byId("theme");
  function setTheme(dark) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    theme.setAttribute("aria-pressed", String(dark));
    theme.textContent = dark ? "Light" : "Dark";
    drawKeys();
    drawAll();
  }
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  theme.addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
  prefersDark.addEventListener("change", (event) => setTheme(event.matches));
  // On paper the colours of the style sheet are others: plots follow.
  matchMedia("print").addEventListener("change", () => { drawKeys(); drawAll(); });

  for (const box of document.querySelectorAll("[data-row]")) {
    box.addEventListener("change", () => {
      shown[box.checked ? "add" : "delete"](Number(box.dataset.row));
      drawAll();
    });
  }
  function check(value) {
    for (const box of document.querySelectorAll("[data-row]")) {
      box.checked = value;
      shown[value ? "add" : "delete"](Number(box.dataset.row));
    }
    drawAll();
  }
  byId("all").addEventListener("click", () => check(true));
  byId("none").addEventListener("click", () => check(false));
  byId("open").addEventListener("click", () => {
    for (const details of document.querySelectorAll("#details details")) details.open = true;
  });
  for (const details of document.querySelectorAll("details.run")) {
    details.addEventListener("toggle", () => { if (details.open) drawFigures(details); });
  }

  function figureOf(cell) {
    const found = cell.textContent.match(/^[+-]?\d[\d.]*(e[+-]?\d+)?/);
    return found ? Number(found[0]) : null;
  }
  function compare(a, b) {
    const [first, second] = [figureOf(a), figureOf(b)];
    if (first !== null && second !== null) return first - second;
    return a.textContent.localeCompare(b.textContent);
  }
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = head.closest("table").tBodies[0];
      const column = head.cellIndex;
      const lacks = (row) => Number(row.cells[column].textContent === "-");
      // What was not measured is last either way.
      const sorted = [...body.rows].sort((a, b) =>
        lacks(a) - lacks(b) || (up ? 1 : -1) * compare(a.cells[column], b.cells[column]));
      body.append(...sorted);
    });
  }

  setTheme(prefersDark.matches);
})();
