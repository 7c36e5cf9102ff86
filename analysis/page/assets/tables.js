// Tables: a click on a heading sorts; tables of more than a few rows can be filtered; all can be copied.
// The page's tables are plain HTML. Without this script they are read as they stand.

const { default: DataTable } = await unpackedModule("tables-library");

const FEW_ROWS = 8; // need no filter
const NUMBER = /[+−-]?\d+(\.\d+)?(e[+−-]?\d+)?/;

/** The first number of a text such as "+0.02 [−0.01, +0.05]"; what has none comes last. */
function number(text) {
  const found = NUMBER.exec(text);
  return found ? Number(found[0].replaceAll("−", "-")) : Infinity;
}

DataTable.type("leading-number", { order: { pre: number } });

/** Makes a table sortable and returns its DataTable; its controls stand before its box, which alone scrolls. */
function sortable(table) {
  const box = table.parentElement;
  const headings = [...table.tHead.rows[0].cells];
  const many = table.tBodies[0].rows.length > FEW_ROWS;
  const name = caption(box);
  const made = new DataTable(table, {
    autoWidth: false,
    paging: false,
    info: false,
    order: [],
    orderClasses: false,
    layout: {
      topStart: many ? "search" : null,
      topEnd: { buttons: [{ extend: "copyHtml5", text: "Copy", title: null, attr: { "aria-label": `Copy: ${name}` } }] },
      bottomStart: null,
      bottomEnd: null,
    },
    language: { search: "Filter", zeroRecords: "No row matches.", emptyTable: "No row." },
    columnDefs: headings.flatMap((heading, at) =>
      heading.classList.contains("number") ? [{ targets: at, type: "leading-number" }] : [],
    ),
  });
  const controls = document.createElement("div");
  controls.className = "table-controls";
  controls.append(
    ...made.table().container().querySelectorAll(".dt-search, .dt-buttons"),
  );
  box.before(controls);
  made.on("order", () => table.classList.toggle("sorted", made.order().length > 0));
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", `Table: ${name}`);
  return made;
}

/** The heading that a table stands under, or the summary of what it is folded in. */
function caption(box) {
  const folded = box.closest("details");
  if (folded) return folded.firstElementChild.textContent;
  for (let before = box.previousElementSibling; before; before = before.previousElementSibling) {
    if (/^H\d$/.test(before.tagName)) return before.textContent;
  }
  return document.title;
}

// so that the keyboard, too, can scroll what is wider than the page
for (const box of document.querySelectorAll(".box, pre")) box.tabIndex = 0;

const tables = new Map([...document.querySelectorAll(".box > table")].map((table) => [table, sortable(table)]));
