"use strict";
// Tables sort by a click on a head. Without script they stay in the order of the declaration.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const declared = [...body.rows];

  const valueOf = (row, column) => {
    const raw = row.cells[column].dataset.sort;
    return raw === "" || Number.isNaN(Number(raw)) ? raw : Number(raw);
  };
  const compare = (column, sign) => (one, other) => {
    const [a, b] = [valueOf(one, column), valueOf(other, column)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(b));
  };
  // First up, then down, then back to the declaration.
  const sortBy = (column) => {
    const was = heads[column].getAttribute("aria-sort");
    const now = { ascending: "descending", descending: null }[was] ?? (was ? null : "ascending");
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    if (now) heads[column].setAttribute("aria-sort", now);
    const sign = now === "descending" ? -1 : 1;
    body.append(...(now ? [...declared].sort(compare(column, sign)) : declared));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(column));
    head.append(button);
  });
}
