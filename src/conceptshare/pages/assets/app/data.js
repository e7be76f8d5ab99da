// Data files, which are scripts, and the addresses of views.

const BLOCK = 64; // features in a file of details
const SAMPLES = 500; // in a file of captions, and in a folder of thumbnails
const ANY = "any"; // in place of the number of a layer

const arrived = new Map();
const files = new Map();
window.conceptshare = { add: (key, value) => arrived.set(key, value) };

// The page's policy lets no text become a script or markup, except the addresses of data files.
const addresses = window.trustedTypes
  ? window.trustedTypes.createPolicy("data-files", { createScriptURL: (address) => address })
  : { createScriptURL: (address) => address };

class FileError extends Error {
  constructor(key, what, title = "A file cannot be read") {
    super(`${key}.js ${what}`);
    this.title = title;
  }
}

async function unpack(key, value) {
  try {
    const bytes = Uint8Array.from(atob(value), (character) => character.charCodeAt(0));
    return await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
  } catch {
    throw new FileError(key, "could not be unpacked.");
  }
}

function request(key) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = addresses.createScriptURL(`${key.split("/").map(encode).join("/")}.js`);
    script.onload = () => {
      script.remove();
      if (!arrived.has(key)) return reject(new FileError(key, "holds the data of another file."));
      resolve(unpack(key, arrived.get(key)));
      arrived.delete(key);
    };
    script.onerror = () => {
      script.remove();
      reject(new FileError(key, "is missing.", "A file is missing"));
    };
    document.head.append(script);
  });
}

/** A data file, which is read once; if that fails, the next request tries again. */
function load(key) {
  if (!files.has(key)) {
    files.set(key, request(key));
    files.get(key).catch(() => files.delete(key));
  }
  return files.get(key);
}

const three = (number) => String(number).padStart(3, "0");
const folder = (at) => `data/${at.dataset}/${at.sae}`;
const layerFile = (layer) => `layer-${String(layer).padStart(2, "0")}`;
const loadTable = (at) => load(`${folder(at)}/${at.member}/${layerFile(at.layer)}`);

const loadBlock = (at, kind) =>
  load(`${folder(at)}/${at.member}/${layerFile(at.layer)}/${kind}${three(Math.floor(at.feature / BLOCK))}`);

async function loadFeature(at) {
  const { first, features } = await loadBlock(at, "");
  return features[at.feature - first];
}

async function loadMaps(at) {
  const { first, maps } = await loadBlock(at, "maps-");
  return maps[at.feature - first];
}

async function loadSample(dataset, sample) {
  const number = Math.floor(sample / SAMPLES);
  const { captions, sizes } = await load(`samples/${dataset}/${three(number)}`);
  const at = sample - number * SAMPLES;
  const name = String(sample).padStart(6, "0");
  const source = `samples/${encode(dataset)}/${three(number)}/${name}.webp`;
  return { sample, caption: captions[at] ?? "", size: sizes[at], source };
}

let study = null;

/** In front of the layers among which the best match in several layers is found. */
const explained = () => (study.unexplained_layers === "leave_out" ? "explained " : "");

/** The layers that count as unexplained, by the bound of an SAE setting. */
const unexplained = (at) => [
  "layers whose SAE has an ",
  term("FVU"),
  ` above ${study.max_fvu_global[at.sae]} at global tokens`,
];

function encode(text) {
  return encodeURIComponent(text).replaceAll("%40", "@");
}

function link(kind, parts, query) {
  const search = new URLSearchParams(query ?? {}).toString();
  return `#/${[kind, ...parts].map(encode).join("/")}${search && `?${search}`}`;
}

const tableLink = (at, query) => link("layer", [at.dataset, at.sae, at.member, at.layer], query);
const featureLink = (at) => link("feature", [at.dataset, at.sae, at.member, at.layer, at.feature]);
const pairLink = (at, a, i, b, j) => link("pair", [at.dataset, at.sae, a, i, b, j]);
const rankingLink = (ranking) => link("ranking", [ranking.dataset, ranking.sae, ranking.name]);

/** Whether an analysis is of the data set and SAE setting at an address. */
const inSet = (at) => (analysis) => analysis.dataset === at.dataset && analysis.sae === at.sae;

class NotFound extends Error {}

function found(value, message) {
  if (value === undefined) throw new NotFound(message);
  return value;
}

/** A ranking of the data set and SAE setting at an address, or undefined. */
const rankingNamed = (name, at) => study.sharedness.filter(inSet(at)).find((ranking) => ranking.name === name);

/** The members that a table has matches in, in the order of the study. */
const othersOf = (table) => study.members.map(({ name }) => name).filter((name) => Object.hasOwn(table.best, name));

const memberNamed = (name) =>
  found(
    study.members.find((member) => member.name === name),
    `There is no member “${plain(name)}”.`,
  );

/** The data set, SAE setting, member, layer and feature of an address; all exist in the study. */
function place([dataset, sae, member, layer, feature]) {
  if (!study.datasets.some(({ name }) => name === dataset))
    throw new NotFound(`There is no data set “${plain(dataset ?? "")}”.`);
  if (!study.saes.includes(sae)) throw new NotFound(`There is no SAE setting “${plain(sae ?? "")}”.`);
  const at = { dataset, sae };
  if (member === undefined) return at;
  const { layers, features } = memberNamed(member);
  at.member = member;
  at.layer = found(
    layers.find((number) => String(number) === layer),
    `${member} has no layer “${plain(layer ?? "")}”.`,
  );
  if (feature === undefined) return at;
  if (!/^\d{1,9}$/.test(feature) || Number(feature) >= features[sae])
    throw new NotFound(`${member} has features 0 to ${features[sae] - 1}, and no “${plain(feature)}”.`);
  at.feature = Number(feature);
  return at;
}
