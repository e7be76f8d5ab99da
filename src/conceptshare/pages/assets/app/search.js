// Samples and the features that fire for them, in every member side by side; samples are found by words.

const FOUND = 24; // samples shown
const LISTED = 6; // features of a member shown
const searchLink = (at, query) => link("search", [at.dataset, at.sae], query);

const wordsOf = (text) => [...new Set(text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [])];

/** The samples whose captions have the most of some words; rarer words count more. */
async function samplesWith(dataset, wanted) {
  const { samples } = study.datasets.find(({ name }) => name === dataset);
  const starts = Array.from({ length: Math.ceil(samples / SAMPLES) }, (_, n) => n);
  const files = await Promise.all(starts.map((n) => load(`samples/${dataset}/${three(n)}`)));
  const has = files.flatMap(({ captions }) => captions.map((caption) => new Set(wordsOf(caption ?? ""))));
  const weights = wanted.map((word) => Math.log(1 + samples / (1 + has.filter((own) => own.has(word)).length)));
  const found = has
    .map((own, sample) => ({ sample, score: wanted.reduce((sum, word, n) => sum + own.has(word) * weights[n], 0) }))
    .filter(({ score }) => score > 0)
    .sort((a, b) => b.score - a.score || a.sample - b.sample);
  // Without those that have clearly less of the words than the best.
  return found
    .filter(({ score }) => score > 0.7 * found[0].score)
    .slice(0, FOUND)
    .map(({ sample }) => sample);
}

/** A member's features that fire for some samples and for few others: by the cosine of both sets of samples. */
async function firing(at, samples) {
  const numbers = [...new Set(samples.map((sample) => Math.floor(sample / SAMPLES)))];
  const read = async (n) => [n, await load(`${folder(at)}/${at.member}/samples/${three(n)}`)];
  const [sizes, ...lists] = await Promise.all([load(`${folder(at)}/${at.member}/samples`), ...numbers.map(read)]);
  const of = new Map(lists);
  const features = new Map();
  for (const sample of samples)
    for (const [feature, place] of of.get(Math.floor(sample / SAMPLES))[sample % SAMPLES]) {
      const known = features.get(feature) ?? { count: 0, place };
      features.set(feature, { feature, count: known.count + 1, place: Math.min(known.place, place) });
    }
  const cosine = ({ feature, count }) => count / Math.sqrt(samples.length * sizes[feature]);
  const found = [...features.values()].map((one) => ({ ...one, size: sizes[one.feature], cosine: cosine(one) }));
  const order = samples.length > 1 ? (a, b) => b.cosine - a.cosine : (a, b) => a.place - b.place;
  return found.sort((a, b) => order(a, b) || a.feature - b.feature).slice(0, LISTED);
}

/** The features of every member that fire for some samples. */
function firingList(at, samples) {
  return h(
    "ul.matches",
    study.members.map((member) => {
      const here = { ...at, member: member.name, layer: member.layers.at(-1) };
      const list = lazily(h("div.firing"), async () => {
        const features = await firing(here, samples);
        if (!features.length) return h("p.quiet", "None has these among its strongest samples.");
        return features.map(({ feature, count, place, size }) => {
          const one = { ...here, feature };
          const called = lazily(h("span.name"), async () => named(await loadFeature(one)));
          const where =
            samples.length > 1 ? `${count} of these, ${size} in all` : `strongest but ${place}`.replace(/ but 0$/, "");
          return h(
            "div.fired",
            h("p", anchor(featureLink(one), `Feature ${feature}`), ": ", called, h("span.quiet", ` (${where})`)),
            strip(one, 4),
          );
        });
      });
      return h("li.match", h("h3", member.name), h("p.quiet", `layer ${here.layer}, ${describe(member)}`), list);
    }),
  );
}

async function sampleView(parts) {
  const [dataset, sae, number] = parts;
  const at = place([dataset, sae]);
  const { samples } = study.datasets.find(({ name }) => name === dataset);
  if (!/^\d{1,9}$/.test(number) || Number(number) >= samples)
    throw new NotFound(`${dataset} has samples 0 to ${samples - 1}, and no “${plain(number)}”.`);
  const sample = await loadSample(dataset, Number(number));
  return {
    title: `Sample ${number}`,
    crumbs: [[`Sample ${number}`, sampleLink(at, number)]],
    nodes: [
      h("div.samples", specimen(at, sample)),
      section(
        "Features that fire for it",
        h("p.note", "Features of last layers that have it among their 100 strongest samples, those for which it is strongest first."),
        firingList(at, [Number(number)]),
      ),
    ],
    update() {},
  };
}

function searchView(parts) {
  const at = place(parts);
  const box = search("Words or a sentence");
  const body = h("div");
  let shown = null;
  async function draw(text) {
    const wanted = wordsOf(text);
    if (!wanted.length) return h("p.note", "Type what captions should say.");
    const found = await samplesWith(at.dataset, wanted);
    if (!found.length) return h("p.note", "No caption has any of these words.");
    const all = await Promise.all(found.map((sample) => loadSample(at.dataset, sample)));
    return [
      section(
        "Features that fire for these samples",
        h(
          "p.note",
          "Features of last layers with many of them among their up to 100 strongest samples, and with few others there.",
        ),
        firingList(at, found),
      ),
      section(
        "Samples",
        h("p.note", `${plural(found.length, "sample")} whose captions have the most of these words.`),
        h(
          "div.samples",
          all.map((sample) => specimen(at, sample)),
        ),
      ),
    ];
  }
  return {
    title: `Search ${at.dataset}`,
    crumbs: [[`Search ${at.dataset}`, searchLink(at)]],
    nodes: [box.node, body],
    async update(query) {
      box.sync(query);
      const text = query.get("q") ?? "";
      if (text === shown) return;
      shown = text;
      const slot = h("div");
      await fill(slot, () => draw(text));
      if (shown === text) body.replaceChildren(slot);
    },
  };
}
