"use strict";
// Sorts and filters the table of variants. All text is set as text, never as HTML.
(() => {
  const table = document.querySelector("table.study");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const controls = document.querySelector(".controls");
  const make = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const text = (row, index) => row.cells[index].textContent.trim();
  const isBase = (row) => row.classList.contains("base");

  // A filter for every column of text but the first, which is searched; the base model always stays.
  const search = make("input", { type: "search", placeholder: "part of a name" });
  const filters = heads.flatMap((head, index) => {
    if (index === 0 || !head.classList.contains("text")) return [];
    const values = [...new Set(rows.filter((row) => !isBase(row)).map((row) => text(row, index)))];
    const select = make("select", {}, ...["any", ...values].map((value) => make("option", { value, textContent: value })));
    if (values.includes("pooled")) select.value = "pooled";
    return [{ index, select, title: head.textContent, pooled: values.includes("pooled") }];
  });
  const figures = make("select", {}, ...["headline", "all"].map((value) => make("option", { value, textContent: value })));
  figures.addEventListener("change", () => table.classList.toggle("all", figures.value === "all"));
  const count = make("p", { className: "note" });
  count.setAttribute("aria-live", "polite");
  controls.append(make("label", {}, "variant", search), ...filters.map((one) => make("label", {}, one.title, one.select)), make("label", {}, "figures", figures), count);
  controls.hidden = false;

  function filter() {
    const words = search.value.trim().toLowerCase();
    const shown = rows.filter((row) => {
      const fits = isBase(row) || (text(row, 0).toLowerCase().includes(words) && filters.every(({ index, select }) => select.value === "any" || text(row, index) === select.value));
      row.hidden = !fits;
      return fits && !isBase(row);
    });
    const all = rows.filter((row) => !isBase(row)).length;
    count.textContent = `${shown.length} of ${all} rows`;
  }
  for (const { select } of filters) select.addEventListener("change", filter);
  search.addEventListener("input", filter);

  // A click sorts, a second one the other way round; what was not measured comes last, the base model first.
  const order = (row, index) => {
    const cell = row.cells[index];
    const value = cell.dataset.value === undefined ? text(row, index) : cell.dataset.value;
    return value === "–" || value === "" ? null : value;
  };
  heads.forEach((head, index) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sorted = rows.toSorted((a, b) => {
        if (isBase(a) !== isBase(b)) return isBase(a) ? -1 : 1;
        const [x, y] = [order(a, index), order(b, index)];
        if (x === null || y === null) return (x === null) - (y === null);
        const least = Number.isNaN(Number(x)) || Number.isNaN(Number(y)) ? x.localeCompare(y) : Number(x) - Number(y);
        return down ? -least : least;
      });
      body.append(...sorted);
    });
  });
  filter();
})();
