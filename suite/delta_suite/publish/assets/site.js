"use strict";
// Sorting and filtering of the tables, and the plots. Without it every number is still on the page.

// --- sorting ---

function key(row, column) {
  return row.cells[column].dataset.value;
}

function compare(a, b) {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}

function sortBy(table, column) {
  const headers = [...table.tHead.rows[0].cells];
  const ascending = headers[column].getAttribute("aria-sort") !== "ascending";
  const body = table.tBodies[0];
  const rows = [...body.rows];
  rows.sort((a, b) => {
    const [x, y] = [key(a, column), key(b, column)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what does not exist comes last, either way
    return ascending ? compare(x, y) : compare(y, x);
  });
  headers.forEach((header) => header.removeAttribute("aria-sort"));
  headers[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => sortBy(table, column));
  });
}

// --- filtering ---

const form = document.getElementById("filter");
if (form) {
  const rows = [...document.querySelectorAll("table[data-filtered] tbody tr")];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const boxes = [...form.querySelectorAll("input[type=checkbox]")];
  const apply = () => {
    const words = document.getElementById("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    for (const row of rows) {
      const verdicts = row.dataset.verdicts ? row.dataset.verdicts.split("|") : [];
      const fits = !verdicts.length || verdicts.some((word) => chosen.has(word));
      row.hidden = !(fits && words.every((word) => texts.get(row).includes(word)));
      shown += !row.hidden;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} rows shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}

// --- plots ---

const source = document.getElementById("figures");
if (source) {
  const figures = JSON.parse(source.textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const plots = [...document.querySelectorAll(".plot")];

  const template = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: colour("--faint"), linecolor: colour("--line"), tickcolor: colour("--line"), zerolinecolor: colour("--line"),
      automargin: true, showline: true, ticks: "outside",
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
        font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 13 },
        hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
        legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, traceorder: "normal" },
        modebar: { color: colour("--muted"), activecolor: colour("--ink"), bgcolor: "rgba(0,0,0,0)", orientation: "h" },
        margin: { l: 56, r: 16, t: 32, b: 48 },
      },
    };
  };

  const draw = async (div) => {
    const { measurement } = div.dataset;
    const chosen = (what) => document.getElementById(`${what}-${measurement}`)?.value;
    const variant = chosen("variant");
    const plot = div.dataset.plot ?? chosen("metric");
    // Under some variants a metric of the list has no value, and so no figure.
    const figure = figures[measurement][variant][plot] ?? { data: [], layout: {} };
    const width = div.clientWidth;
    const height = div.classList.contains("square") ? Math.min(Math.max(width, 320), 620) : 420;
    // A finger that scrolls the page must not select a part of a plot instead.
    const layout = { ...structuredClone(figure.layout), template: template(), height, dragmode: coarse.matches ? false : "zoom" };
    if (chosen("steps")) layout.xaxis = { ...layout.xaxis, type: chosen("steps") };
    const options = { responsive: true, displaylogo: false, displayModeBar: coarse.matches ? false : "hover" };
    await Plotly.react(div, structuredClone(figure.data), layout, options);
    const scheme = dark.matches ? "dark" : "light";
    div.dataset.drawn = [variant, chosen("metric"), chosen("steps"), scheme].filter(Boolean).join(" ");
  };
  const drawAll = async (chosen) => {
    for (const div of chosen) {
      await draw(div);
      await new Promise((done) => setTimeout(done)); // the page stays alive between two plots
    }
  };

  for (const select of document.querySelectorAll("select[data-measurement]")) {
    select.addEventListener("change", () => drawAll(plots.filter((div) => div.dataset.measurement === select.dataset.measurement)));
  }
  dark.addEventListener("change", () => drawAll(plots));
  drawAll(plots);
}
