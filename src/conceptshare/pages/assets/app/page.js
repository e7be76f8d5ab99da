// The page: which view an address means, the header, and the colour scheme.

// Each kind of view, and the number of parts that its address has besides.
const VIEWS = {
  "": [overview, 0],
  layer: [layerView, 4],
  feature: [featureView, 5],
  pair: [pairView, 6],
  ranking: [rankingView, 3],
  fit: [fitView, 3],
  marks: [marksView, 0],
  sample: [sampleView, 3],
  search: [searchView, 2],
};
const scrolled = new Map();
let entry = null; // of the browser's history: the one that is shown
let entries = 0;
let turn = 0;

const newEntry = () => `${Date.now()}-${entries++}`;

function remember(move) {
  scrolled.set(entry, window.scrollY);
  move();
  entry = history.state?.entry ?? null;
}

async function build(path) {
  try {
    let parts;
    try {
      parts = path.split("/").slice(1).map(decodeURIComponent);
    } catch {
      throw new NotFound("This address cannot be read.");
    }
    const [kind = "", ...rest] = parts;
    if (!Object.hasOwn(VIEWS, kind) || (!kind && rest.length)) throw new NotFound("There is no such page.");
    study ??= await load("study");
    const [view, length] = VIEWS[kind];
    if (rest.length !== length) throw new NotFound("This address is incomplete.");
    return await view(rest);
  } catch (error) {
    const home = h("p", anchor("#/", "Back to the overview"));
    if (error instanceof NotFound)
      return { title: "Not found", crumbs: [], nodes: [h("p", error.message), home], update() {} };
    if (!(error instanceof FileError)) throw error;
    return {
      title: error.title,
      crumbs: [],
      nodes: [
        h("p.error", error.message),
        h("p", "These pages need every file of their folder. Copy the whole folder, or run the study again."),
        home,
      ],
      update() {},
    };
  }
}

async function show(first) {
  const [path, search] = `${location.hash.slice(1) || "/"}`.split(/\?(.*)/s);
  const query = new URLSearchParams(search ?? "");
  const returning = history.state?.entry ?? null;
  if (!returning) history.replaceState({ entry: newEntry() }, "");
  entry = history.state.entry;
  if (current?.path === path) {
    turn++;
    current.query = query;
    return current.update(query);
  }
  const mine = ++turn;
  const main = document.getElementById("main");
  current = null;
  typed = {};
  watcher.disconnect();
  main.setAttribute("aria-busy", "true");
  const view = await build(path);
  if (mine !== turn) return;
  const heading = h("h1", { tabindex: "-1" }, view.heading ?? view.title);
  main.replaceChildren(heading, ...view.nodes.flat().filter(Boolean));
  main.removeAttribute("aria-busy");
  document.title = `${view.title} – ${study?.study ?? "concept pages"}`;
  current = { path, query, update: view.update };
  view.update(query);
  header(view);
  if (!first) heading.focus({ preventScroll: true });
  if (scrolled.has(returning)) {
    // The page must have its former length before it can scroll to its former position.
    const waiting = [...main.querySelectorAll(".samples")].filter((element) => element.whenSeen);
    await Promise.all(waiting.map((element) => watcher.unobserve(element) ?? fill(element, element.whenSeen)));
    if (mine !== turn) return;
  }
  window.scrollTo(0, scrolled.get(returning) ?? 0);
}

let jumpTo = () => {};

function header(view) {
  const links = [[study?.study ?? "Overview", "#/"], ...view.crumbs];
  document
    .getElementById("crumbs")
    .replaceChildren(
      ...links.map(([text, href], at) =>
        h(
          "li",
          h(
            "a",
            { href, "aria-current": at === links.length - 1 && current.path === href.slice(1) ? "page" : null },
            text,
          ),
        ),
      ),
    );
  if (!study) return;
  jumpTo(view.at);
  countMarks();
}

function jumpBox() {
  const form = document.getElementById("jump");
  const sets = study.datasets.flatMap(({ name }) => study.saes.map((sae) => ({ dataset: name, sae })));
  const option = (value, text) => h("option", { value }, text);
  const set = h(
    "select",
    { "aria-label": "Data set and SAE setting" },
    sets.map(({ dataset, sae }, at) => option(at, `${dataset}, ${sae}`)),
  );
  const member = h(
    "select",
    { "aria-label": "Member" },
    study.members.map(({ name }) => option(name, name)),
  );
  const layer = h("select", { "aria-label": "Layer" });
  const feature = h("input", {
    type: "number",
    min: 0,
    required: true,
    "aria-label": "Feature number",
    placeholder: "feature",
  });
  const layers = () => {
    const chosen = memberNamed(member.value);
    const before = layer.value;
    layer.replaceChildren(...chosen.layers.map((number) => option(number, `layer ${number}`)));
    if (chosen.layers.includes(Number(before)) && before) layer.value = before;
    feature.max = chosen.features[(sets[set.value] ?? sets[0]).sae] - 1;
  };
  member.addEventListener("change", layers);
  set.addEventListener("change", layers);
  form.replaceChildren(...(sets.length > 1 ? [set] : []), member, layer, feature, h("button", "Go"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    location.hash = featureLink({
      ...sets[set.value],
      member: member.value,
      layer: layer.value,
      feature: Number(feature.value),
    });
  });
  jumpTo = (at) => {
    if (!at) return;
    set.value = sets.findIndex(({ dataset, sae }) => dataset === at.dataset && sae === at.sae);
    member.value = at.member;
    layers();
    layer.value = at.layer;
    feature.value = at.feature ?? "";
  };
  layers();
}

// A page from file:// may have no storage, and reading the name alone can throw.
const storage = (use) => {
  try {
    return use(window.localStorage);
  } catch {
    return null;
  }
};
const preferred = window.matchMedia("(prefers-color-scheme: dark)");
const dark = () => (document.documentElement.dataset.theme ?? (preferred.matches ? "dark" : "light")) === "dark";
const remembered = storage((store) => store.getItem("conceptshare-theme"));
if (["dark", "light"].includes(remembered)) document.documentElement.dataset.theme = remembered;

document.addEventListener("DOMContentLoaded", async () => {
  history.scrollRestoration = "manual";
  const theme = document.getElementById("theme");
  const pressed = () => theme.setAttribute("aria-pressed", String(dark()));
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    storage((store) => store.setItem("conceptshare-theme", document.documentElement.dataset.theme));
    pressed();
  });
  preferred.addEventListener("change", pressed);
  pressed();
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    (document.querySelector("h1") ?? document.getElementById("main")).focus();
  });
  window.addEventListener("hashchange", () => {
    scrolled.set(entry, window.scrollY);
    show(false);
  });
  study = await load("study").catch(() => null);
  if (study) jumpBox();
  show(true);
});
