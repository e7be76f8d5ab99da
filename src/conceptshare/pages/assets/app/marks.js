// Features that the reader marked, with notes: kept in this browser, exported and imported as JSON.

const marksKey = () => `conceptshare-marks ${study.study}`;
let marks = null;

const PLACE = ["dataset", "sae", "member", "layer", "feature"];
const same = (a, b) => PLACE.every((key) => a[key] === b[key]);

/** The mark of a feature of this study, or none: the names of an imported one become paths of files. */
function readMark(mark) {
  try {
    return [{ ...place(PLACE.map((key) => String(mark[key]))), note: String(mark.note ?? "") }];
  } catch {
    return [];
  }
}

const readMarks = (list) => (Array.isArray(list) ? list : []).flatMap(readMark);

function allMarks() {
  if (!marks) {
    try {
      marks = readMarks(JSON.parse(storage((store) => store.getItem(marksKey()))));
    } catch {
      marks = [];
    }
  }
  return marks;
}

/** Keep the marks in this browser, and their number in the header. */
function keepMarks(list) {
  marks = list;
  storage((store) => store.setItem(marksKey(), JSON.stringify(list)));
  countMarks();
}

function countMarks() {
  const count = allMarks().length;
  document.getElementById("marks").textContent = `Marked (${count})`;
}

function noteOf(mark) {
  const input = h("input", {
    "aria-label": `Note on feature ${mark.feature} of ${mark.member}, layer ${mark.layer}`,
    placeholder: "note",
    autocomplete: "off",
  });
  input.value = mark.note;
  input.addEventListener("change", () => {
    mark.note = input.value;
    keepMarks(allMarks());
  });
  return input;
}

/** A button that marks a feature, and a note on it once it is marked. */
function marker({ dataset, sae, member, layer, feature }) {
  const mark = { dataset, sae, member, layer, feature, note: "" };
  const known = () => allMarks().find((one) => same(one, mark));
  const note = h("span");
  const button = h("button", { type: "button" });
  const draw = () => {
    const one = known();
    button.textContent = one ? "★ Marked" : "☆ Mark";
    button.setAttribute("aria-pressed", String(Boolean(one)));
    note.replaceChildren(...(one ? [noteOf(one)] : []));
  };
  button.addEventListener("click", () => {
    keepMarks(known() ? allMarks().filter((one) => !same(one, mark)) : [...allMarks(), mark]);
    draw();
  });
  draw();
  return h("p.marker", button, " ", note);
}

function exportMarks() {
  const text = JSON.stringify(allMarks(), null, 1);
  const href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href, download: `${study.study}-marked.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60000);
}

/** Add the marks of a file: notes of features that are marked already are replaced. */
async function importMarks(file, status) {
  let list = [];
  try {
    list = JSON.parse(await file.text());
  } catch {
    // What is no JSON has no marks.
  }
  const found = readMarks(list);
  const others = found.length < list.length ? `; ${list.length - found.length} of other studies left out` : "";
  status.textContent = found.length
    ? `${plural(found.length, "marked feature")} read from ${plain(file.name)}${others}.`
    : `${plain(file.name)} has no marked features of this study. Choose a file that “Export” wrote.`;
  keepMarks([...allMarks().filter((one) => !found.some((other) => same(one, other))), ...found]);
}

function markedRow(mark, redraw) {
  const remove = h("button", { type: "button" }, "Remove");
  remove.addEventListener("click", () => {
    keepMarks(allMarks().filter((one) => one !== mark));
    redraw();
  });
  const called = lazily(h("span"), async () => named(await loadFeature(mark)));
  return h(
    "tr",
    h("th", { scope: "row" }, anchor(featureLink(mark), `${mark.member}, layer ${mark.layer}, feature ${mark.feature}`)),
    h("td", called),
    h("td", strip(mark, 3)),
    h("td", noteOf(mark)),
    h("td", remove),
  );
}

function marksView() {
  const body = h("tbody");
  const status = h("p", { role: "status" });
  const empty = h("p.quiet", "No feature is marked. Mark one on its page.");
  const redraw = () => {
    body.replaceChildren(...allMarks().map((mark) => markedRow(mark, redraw)));
    empty.hidden = allMarks().length > 0;
  };
  const save = h("button", { type: "button" }, "Export");
  save.addEventListener("click", exportMarks);
  const file = h("input", { type: "file", accept: ".json,application/json" });
  file.addEventListener("change", async () => {
    if (file.files.length) await importMarks(file.files[0], status);
    file.value = "";
    redraw();
  });
  redraw();
  const columns = ["Feature", "Name", "Strongest samples", "Note", ""];
  return {
    title: "Marked features",
    crumbs: [["Marked features", "#/marks"]],
    nodes: [
      h("p.note", "Marks and notes are kept in this browser only. Export them to share them or to keep them."),
      h("p.marker", save, " ", h("label.field", "Import", file)),
      status,
      empty,
      h(
        "div.scroll",
        h("table.listing", h("thead", h("tr", columns.map((text) => h("th", { scope: "col" }, text)))), body),
      ),
    ],
    update() {},
  };
}
