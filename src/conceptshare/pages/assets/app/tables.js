// Controls, whose values are in the address, and tables with filters, sorting and pages.

const ROWS = 100; // of a table, on one page

let current = null; // the view that is shown: its path, query and update()
let typed = {}; // typed values that are not in the address yet
let timer = 0;

function change(changes, push) {
  clearTimeout(timer);
  if (!current) return;
  const query = new URLSearchParams(current.query);
  query.delete("page");
  const all = { ...typed, ...changes };
  typed = {};
  for (const [key, value] of Object.entries(all)) value ? query.set(key, value) : query.delete(key);
  const search = query.toString();
  const address = `#${current.path}${search && `?${search}`}`;
  if (push) remember(() => history.pushState({ entry: newEntry() }, "", address));
  else history.replaceState(history.state, "", address);
  current.query = query;
  current.update(query);
}

/** A labelled input or select whose value is in the address. */
function control(label, key, attributes, options) {
  const box = attributes.type === "checkbox";
  const input = h(
    options ? "select" : "input",
    { ...attributes, autocomplete: "off" },
    (options ?? []).map(([value, text]) => h("option", { value }, text)),
  );
  const off = attributes["data-off"] ?? "";
  if (box || options)
    input.addEventListener("change", () => change({ [key]: !box || input.checked ? input.value : off }, true));
  else
    input.addEventListener("input", () => {
      typed[key] = input.value;
      clearTimeout(timer);
      timer = setTimeout(() => change({}, false), 120);
    });
  const sync = (query) => {
    const value = query.get(key) ?? "";
    if (box) input.checked = value === attributes.value;
    else if (input.value !== value && document.activeElement !== input) input.value = value;
    if (options && input.selectedIndex < 0) input.selectedIndex = 0;
  };
  const active = () => (box ? input.checked : input.value !== "");
  return { node: h("label", { class: box ? "check" : "field" }, box ? [input, label] : [label, input]), sync, active };
}

const nodeOf = (control) => control.node;

/** Controls behind a toggle, which counts those in use. */
function moreFilters(controls) {
  const summary = h("summary", "More filters");
  const node = h("details.more", summary, h("div", controls.map(nodeOf)));
  const sync = (query) => {
    for (const one of controls) one.sync(query);
    const active = controls.filter((one) => one.active()).length;
    summary.textContent = active ? `More filters (${active} in use)` : "More filters";
    node.classList.toggle("active", active > 0);
  };
  return { node, sync };
}

const limit = (query, key) => {
  const text = query.get(key);
  return text === null || !Number.isFinite(Number(text)) ? null : Number(text);
};

/** Whether a value is within limits. Without limits all are; a null is within none. */
function between(value, low, high) {
  if (low === null && high === null) return true;
  return value !== null && value !== undefined && (low === null || value >= low) && (high === null || value <= high);
}

function searching(query) {
  const text = (query.get("q") ?? "").trim().toLowerCase();
  const number = /^#?\d+$/.test(text) ? Number(text.replace("#", "")) : null;
  return (feature, called) =>
    !text || feature === number || (called?.name ?? called?.candidate ?? "").toLowerCase().includes(text);
}

/**
 * A table with filters, sorting and pages, whose state is in the address.
 *
 * Columns are {id, label, hint, value(row), cell(row), text}; the one with `heading` names the row.
 */
function listing({ caption, columns, count, sorted, controls, keep, unit }) {
  const status = h("p.count", { role: "status" });
  const body = h("tbody");
  const pager = h("nav.pager", { "aria-label": "Pages of the table" });
  const heads = columns.map((column) =>
    h(
      "th",
      {
        scope: "col",
        class: `${column.text || !column.value ? "" : "number"}${column.label.length > 16 ? " long" : ""}`,
      },
      column.value
        ? h("button", { type: "button", ...(column.hint && hinted(column.hint)), onclick: () => sort(column) }, column.label)
        : h("span", column.label),
    ),
  );
  const readSort = (query) => {
    const text = query.get("sort") ?? "";
    const column = columns.find(({ id, value }) => value && (text === id || text === `-${id}`));
    if (column) return { column, down: text.startsWith("-") };
    return { column: columns.find(({ id }) => id === sorted.slice(1)), down: sorted[0] === "-" };
  };
  function sort(column) {
    const now = readSort(current.query);
    const down = now.column === column ? !now.down : !column.text && !column.rising;
    change({ sort: `${down ? "-" : ""}${column.id}` }, true);
  }
  const step = (page, label, enabled) =>
    h("button", { type: "button", disabled: !enabled, onclick: () => turnTo(page) }, label);
  function turnTo(page) {
    change({ page: page > 1 ? String(page) : "" }, true);
    frame.scrollIntoView();
    (pager.querySelector("button:not([disabled])") ?? frame).focus({ preventScroll: true });
  }
  const frame = h(
    "div.scroll",
    { tabindex: "0", role: "region", "aria-label": caption },
    h("table.listing", h("caption.hidden", caption), h("thead", h("tr", heads)), body),
  );

  function update(query) {
    for (const { sync } of controls) sync(query);
    const { column, down } = readSort(query);
    heads.forEach((head, at) => {
      if (columns[at].value)
        head.setAttribute("aria-sort", columns[at] === column ? (down ? "descending" : "ascending") : "none");
    });
    const kept = keep(query);
    const rows = [];
    for (let row = 0; row < count; row++) if (kept(row)) rows.push(row);
    const values = new Map(rows.map((row) => [row, column.value(row)]));
    const sign = down ? -1 : 1;
    rows.sort((a, b) => {
      const [x, y] = [values.get(a) ?? null, values.get(b) ?? null];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return (x < y ? -sign : x > y ? sign : 0) || a - b;
    });
    const pages = Math.max(1, Math.ceil(rows.length / ROWS));
    const page = Math.min(Math.max(1, Math.trunc(limit(query, "page") ?? 1)), pages);
    const shown = rows.slice((page - 1) * ROWS, page * ROWS);
    status.textContent =
      rows.length === count ? plural(count, unit) : `${whole(rows.length)} of ${plural(count, unit)}`;
    body.querySelectorAll(".strip").forEach((strip) => watcher.unobserve(strip));
    body.replaceChildren(
      ...shown.map((row) =>
        h(
          "tr",
          columns.map((column) =>
            h(
              column.heading ? "th" : "td",
              { scope: column.heading ? "row" : null, class: column.text || !column.value ? column.id : "number" },
              column.cell(row),
            ),
          ),
        ),
      ),
    );
    const none = `No ${unit} passes these filters.`;
    if (!shown.length) body.append(h("tr", h("td", { colspan: columns.length }, none)));
    pager.hidden = pages === 1;
    pager.replaceChildren(
      step(1, "First", page > 1),
      step(page - 1, "Previous", page > 1),
      h("span", `Page ${page} of ${pages}`),
      step(page + 1, "Next", page < pages),
      step(pages, "Last", page < pages),
    );
  }
  const filters = h(
    "form.filters",
    {
      role: "search",
      "aria-label": `Filter ${unit}s`,
      onsubmit: (event) => event.preventDefault(),
    },
    controls.map(nodeOf),
  );
  return { nodes: [filters, status, frame, pager], update };
}

const checkbox = (label, key) => control(label, key, { type: "checkbox", value: "yes" });
const search = (label) => control(label, "q", { type: "search" });
const number = (label, key) => control(label, key, { type: "number", step: "any" });
const imagesBox = () => control("Images", "images", { type: "checkbox", value: "", "data-off": "no" });

/** Numbers of layers as links, the present one marked. */
const layerLinks = (label, layers, chosen, address) =>
  h(
    "nav.layers",
    { "aria-label": label },
    h("span", { "aria-hidden": "true" }, label),
    h(
      "ul",
      layers.map((layer) =>
        h("li", h("a", { href: address(layer), "aria-current": layer === chosen ? "page" : null }, String(layer))),
      ),
    ),
  );

/** A correlation with a bar as long as it is. */
const rho = (value) => h("span.rho", fixed(value), meter(Math.min(Math.max(value ?? 0, 0), 1)));
