"use strict";
// Sorting, the matrix, the filters, the comparison of two models, and the plots. Without it every mark and number is still
// on the pages of models.

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

// --- the matrix of the first page ---

for (const button of document.querySelectorAll(".unfold")) {
  const [, ...steps] = button.closest("tbody").rows;
  const unfold = (open) => {
    button.setAttribute("aria-expanded", open);
    for (const row of steps) row.hidden = !open;
  };
  button.addEventListener("click", () => unfold(button.getAttribute("aria-expanded") !== "true"));
  unfold(false);
}

const detail = document.getElementById("detail");
if (detail) {
  let shown = null;
  let leaving = 0;
  const hide = () => {
    shown?.removeAttribute("aria-describedby");
    detail.hidden = true;
    shown = null;
  };
  const show = (mark) => {
    clearTimeout(leaving);
    if (mark === shown) return;
    hide();
    shown = mark;
    const cell = mark.parentElement;
    const table = cell.closest("table");
    const claim = table.tHead.rows[1].cells[cell.cellIndex - 1].dataset.claim;
    const title = document.createElement("strong");
    title.textContent = `${cell.parentElement.cells[0].querySelector("a").textContent}: ${mark.dataset.word}`;
    detail.replaceChildren(title, `${claim}\n${mark.dataset.detail}`);
    if (matchMedia("(pointer: coarse)").matches) {
      const more = document.createElement("a");
      more.href = mark.href;
      more.textContent = "More on the model's page";
      detail.append("\n", more);
    }
    detail.hidden = false;
    mark.setAttribute("aria-describedby", "detail");
    const box = mark.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left + scrollX, scrollX + document.documentElement.clientWidth - detail.offsetWidth - 8));
    const below = box.bottom + detail.offsetHeight + 8 < innerHeight;
    detail.style.left = `${left}px`;
    detail.style.top = `${scrollY + (below ? box.bottom + 4 : box.top - detail.offsetHeight - 4)}px`;
  };
  const leave = () => { leaving = setTimeout(hide, 150); };
  const words = Object.fromEntries([...document.querySelectorAll(".marks .mark")].map((mark) => [mark.classList[1], mark.dataset.word]));
  for (const table of document.querySelectorAll(".matrix")) {
    const marks = [...table.querySelectorAll("td .mark")];
    marks.forEach((mark, index) => {
      mark.tabIndex = index ? -1 : 0; // one stop for the Tab key; arrows go on from there
      mark.dataset.word = words[mark.classList[1]];
    });
    table.addEventListener("pointerover", (event) => event.target.closest("td .mark") && event.pointerType !== "touch" && show(event.target.closest(".mark")));
    table.addEventListener("pointerout", (event) => event.target.closest("td .mark") && event.pointerType !== "touch" && leave());
    table.addEventListener("focusin", (event) => event.target.matches("td .mark") && show(event.target));
    table.addEventListener("focusout", leave);
    table.addEventListener("click", (event) => {
      const mark = event.target.closest("td .mark");
      if (mark && event.pointerType === "touch") { // a finger cannot rest on a mark: it shows, and the link within leads on
        event.preventDefault();
        show(mark);
      }
    });
    table.addEventListener("keydown", (event) => {
      const mark = event.target.closest("td .mark");
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!mark || !step) return;
      const cell = mark.parentElement;
      const rows = [...table.querySelectorAll("tbody tr")].filter((row) => !row.hidden && !row.parentElement.hidden);
      const row = rows[rows.indexOf(cell.parentElement) + step[0]];
      let column = cell.cellIndex + step[1];
      while (row?.cells[column]?.hidden) column += step[1];
      const next = row?.cells[column]?.querySelector(".mark");
      if (next) {
        mark.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        event.preventDefault();
      }
    });
  }
  detail.addEventListener("pointerenter", () => clearTimeout(leaving));
  detail.addEventListener("pointerleave", leave);
  detail.addEventListener("focusin", () => clearTimeout(leaving));
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("pointerdown", (event) => !event.target.closest("#detail, td .mark") && hide());
}

// --- what is chosen stands in the address ---

function remember(form) {
  const chosen = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
  history.replaceState(null, "", `${location.pathname}${chosen.size ? `?${chosen}` : ""}${location.hash}`);
}

function recall(form) {
  for (const [name, value] of new URLSearchParams(location.search)) {
    const field = form.elements.namedItem(name);
    if (field && (field.localName !== "select" || [...field.options].some((option) => option.value === value))) field.value = value;
  }
  form.hidden = false;
}

const form = document.getElementById("filter");
if (form) {
  const apply = () => {
    const chosen = Object.fromEntries(new FormData(form));
    const wanted = chosen.q.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    let total = 0;
    for (const section of document.querySelectorAll(".board")) {
      const table = section.querySelector(".matrix");
      const spans = [...table.tHead.rows[0].cells].slice(1);
      const columns = spans.flatMap((head) => Array(head.colSpan).fill(!chosen.hypothesis || head.dataset.hypothesis === chosen.hypothesis));
      spans.forEach((head) => { head.hidden = Boolean(chosen.hypothesis) && head.dataset.hypothesis !== chosen.hypothesis; });
      [...table.tHead.rows[1].cells].forEach((cell, index) => { cell.hidden = !columns[index]; });
      let any = false;
      for (const body of table.tBodies) {
        let fits = false;
        for (const row of body.rows) {
          [...row.cells].slice(1).forEach((cell, index) => {
            cell.hidden = !columns[index];
            const mark = cell.firstElementChild;
            const matches = !chosen.verdict || mark.dataset.word === chosen.verdict;
            mark.classList.toggle("faded", !matches);
            fits ||= columns[index] && matches;
          });
        }
        const text = `${body.dataset.name} ${body.textContent}`.toLowerCase();
        body.hidden = !(fits && wanted.every((word) => text.includes(word)) && ["family", "size"].every((name) => !chosen[name] || body.dataset[name] === chosen[name]));
        total += 1;
        if (chosen.calibration && section.dataset.calibration !== chosen.calibration) body.hidden = true;
        any ||= !body.hidden;
        shown += !body.hidden;
      }
      section.hidden = !any;
    }
    document.getElementById("shown").textContent = `${shown} of ${total} rows`;
  };
  form.addEventListener("input", () => { apply(); remember(form); });
  form.addEventListener("reset", () => setTimeout(() => { apply(); remember(form); }));
  form.addEventListener("submit", (event) => event.preventDefault());
  recall(form);
  apply();
}

// --- two models side by side ---

const pair = document.getElementById("pair");
if (pair) {
  const { columns, symbols, claims, groups, models } = JSON.parse(document.getElementById("models").textContent);
  const place = document.getElementById("comparison");
  const element = (name, content = [], attributes = {}) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...[content].flat());
    return made;
  };
  const link = (text, href) => (href ? element("a", text, { href }) : text);
  const table = (caption, head, rows) => {
    const title = element("caption", caption, { id: `caption-${caption.replace(/\W+/g, "-")}` });
    const heads = element("thead", element("tr", head.map((name) => element("th", name, { scope: "col" }))));
    const lines = rows.map(([first, ...rest]) => element("tr", [element("th", first, { scope: "row" }), ...rest.map((cell) => element("td", cell))]));
    const whole = element("table", [title, heads, element("tbody", lines)], { class: "plain" });
    return element("div", whole, { class: "scroll", role: "region", tabindex: 0, "aria-labelledby": title.id });
  };
  const verdict = ([word, marks, observed, interval, margin, href]) => {
    const sign = element("a", `${symbols[word]} ${word}${marks}`, { class: `verdict v-${word.toLowerCase().replaceAll(" ", "-")}`, href });
    return observed === "-" ? sign : [sign, element("br"), `${observed}${interval === "-" ? "" : ` ${interval}`}`, element("br"), `margin ${margin}`];
  };
  const draw = () => {
    const keys = ["a", "b"].map((side) => pair.elements.namedItem(side).value);
    const [a, b] = keys.map((key) => models[key]);
    const differing = Object.keys(groups[a.group]).filter((name) => groups[a.group][name] !== groups[b.group][name]);
    const parts = [];
    if (differing.length) {
      const why = differing.map((name) => element("li", `${name}: ${groups[a.group][name]} beside ${groups[b.group][name]}`));
      parts.push(element("div", [element("p", "These two stand in different tables. Their numbers are not comparable, only what became of the claims is:"), element("ul", why)], { class: "note" }));
    }
    const same = a.rows.filter((row, index) => row[0] === b.rows[index][0]).length;
    parts.push(element("p", `${same} of ${claims.length} claims have the same verdict for both. The difference of two figures is not tested here: delta-suite compare does that, from the records.`));
    const sides = keys.map((key) => {
      const drawing = document.querySelector(`template[data-profile="${CSS.escape(key)}"]`).content.cloneNode(true);
      return element("section", [element("h2", link(models[key].label, models[key].page)), drawing]);
    });
    parts.push(element("div", sides, { class: "side" }));
    const names = [a.label, b.label];
    const differ = claims.map((claim, index) => [link(claim.name, claim.link), claim.stated, verdict(a.rows[index]), verdict(b.rows[index]), a.rows[index][0] === b.rows[index][0] ? "same" : "differs"]);
    parts.push(table("Claims", ["claim", "stated", ...names, "verdicts"], differ));
    for (const model of [a, b].slice(0, a === b ? 1 : 2)) {
      const phases = Object.entries(model.phases).map(([name, values]) => [name, ...values]);
      parts.push(table(`Phases of ${model.label}, without sinks`, ["phase", ...columns], phases));
    }
    parts.push(table("What they are", ["fact", ...names], Object.keys(a.facts).map((name) => [name, a.facts[name], b.facts[name]])));
    place.replaceChildren(...parts);
  };
  recall(pair);
  if (pair.elements.a.value === pair.elements.b.value && pair.elements.a.options.length > 1 && !new URLSearchParams(location.search).has("b")) {
    const { options, selectedIndex } = pair.elements.a;
    const beside = options[selectedIndex + 1]?.parentElement === options[selectedIndex].parentElement ? selectedIndex + 1 : Math.max(0, selectedIndex - 1);
    pair.elements.b.value = options[beside].value;
  }
  pair.addEventListener("input", () => { draw(); remember(pair); });
  document.getElementById("swap").addEventListener("click", () => {
    const { a, b } = pair.elements;
    [a.value, b.value] = [b.value, a.value];
    draw();
    remember(pair);
  });
  draw();
}

// --- a link to a claim opens it ---

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.localName === "details") {
    target.open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", openTarget);
openTarget();

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
