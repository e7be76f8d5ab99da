// One feature.

function match(at, name, best) {
  const { rho: value, layer, feature } = best;
  const other = memberNamed(name);
  const head = [h("h3", {}, name), h("p", { class: "quiet" }, describe(other))];
  if (layer < 0) return h("li", { class: "match" }, head, h("p", {}, "No match: nothing correlates."));
  const there = { ...at, member: name, layer, feature };
  const label = h("span", { class: "name" });
  const samples = lazily(h("div", { class: "samples" }), async () => {
    const found = await loadFeature(there);
    const { top, tokens } = found;
    label.replaceChildren(named(found));
    const most = Math.max(0, ...(tokens ?? []).flatMap((entry) => entry?.values ?? []));
    const shown = await Promise.all(top.slice(0, 3).map(([sample]) => loadSample(at.dataset, sample)));
    return shown.map((sample, at) => specimen(sample, top[at][1], tokens?.[at] ? tokenText(tokens[at], most) : null));
  });
  return h(
    "li",
    { class: "match" },
    head,
    h("p", {}, h("span", { class: "large" }, "ρ ", rho(value))),
    h(
      "p",
      { class: "where" },
      h("a", { href: featureLink(there) }, `Layer ${layer}, feature ${feature}`),
      " ",
      label,
    ),
    samples,
  );
}

function facts(pairs) {
  return h(
    "dl",
    { class: "facts" },
    pairs.map(([term, ...values]) => h("div", {}, h("dt", {}, term), h("dd", {}, values))),
  );
}

async function featureView(parts) {
  if (parts.length !== 5) throw new NotFound("This address is incomplete.");
  const at = place(parts);
  const member = memberNamed(at.member);
  const n = at.feature;
  const [table, feature] = await Promise.all([loadTable(at), loadFeature(at)]);
  const called = calledIn(table, n);
  const rank = table.strength.filter((strength) => strength > table.strength[n]).length + 1;
  const others = othersOf(table);
  const mostToken = Math.max(0, ...(feature.tokens ?? []).flatMap((entry) => entry?.values ?? []));
  const specimens = (list, aligned) =>
    Promise.all(
      list.map(async ([sample, value], place) => {
        const tokens = aligned ? feature.tokens?.[place] : null;
        return specimen(await loadSample(at.dataset, sample), value, tokens ? tokenText(tokens, mostToken) : null);
      }),
    );
  const samples = h("div", { class: "samples" });
  await fill(samples, () => specimens(feature.top, true));
  const bands = feature.bands.filter((band) => band.samples.length);

  const overlay = control("Where it fires", "overlay", { type: "checkbox", value: "yes" });
  const key = h("div", { class: "key", hidden: true });
  async function drawOverlay() {
    if (!feature.mapped) return;
    const on = current.query.get("overlay") === "yes";
    const maps = on ? await loadMaps(at) : [];
    if (on !== (current?.query.get("overlay") === "yes")) return;
    const most = Math.max(0, ...maps.map((map) => map?.max ?? 0));
    key.hidden = !on;
    key.replaceChildren(legend({ low: 0, high: most }, "how strongly it fires", size));
    samples.classList.toggle("overlaid", on);
    samples.querySelectorAll(".thumbnail").forEach((frame, at) => {
      frame.querySelector("canvas")?.remove();
      if (maps[at] && frame.querySelector("img")) frame.append(heat(maps[at], most));
    });
  }
  const deltas = Object.entries(table.delta).filter(([, values]) => values[n] !== null);
  const step = (to, text, rel) =>
    to >= 0 && to < member.features[at.sae]
      ? h("a", { href: featureLink({ ...at, feature: to }), rel }, text)
      : h("span", { class: "quiet" }, text);

  return {
    title: `Feature ${n} of ${at.member}, layer ${at.layer}`,
    at,
    crumbs: [crumb(at), [`Feature ${n}`, featureLink(at)]],
    nodes: [
      h(
        "p",
        { class: "called" },
        named(called),
        called.name === null && called.candidate ? h("span", { class: "quiet" }, ` (${UNNAMED})`) : "",
        table.by_command ? h("span", { class: "quiet" }, " (named by a command)") : "",
      ),
      h(
        "nav",
        { class: "steps", "aria-label": "Neighbouring features" },
        step(n - 1, "← Previous", "prev"),
        step(n + 1, "Next →", "next"),
      ),
      facts([
        ["Name z", fixed(table.score[n])],
        ["Name AUC", fixed(table.auc[n])],
        [
          "S",
          size(table.strength[n]),
          feature.top.length
            ? h("span", { class: "quiet" }, ` rank ${whole(rank)} of ${whole(table.strength.length)}`)
            : null,
        ],
        ["Density", percent(table.density[n])],
        ...deltas.map(([ranking, values]) => {
          const entry = study.sharedness.find(
            (other) => other.name === ranking && other.dataset === at.dataset && other.sae === at.sae,
          );
          return ["Δ ", entry ? h("a", { href: rankingLink(entry) }, ranking) : ranking, ` ${size(values[n])}`];
        }),
      ]),
      h(
        "section",
        {},
        h("h2", {}, "Strongest samples"),
        h(
          "p",
          { class: "note" },
          feature.top.length
            ? member.modality === "text"
              ? "The encoder reads only the captions; their images are shown as context."
              : "The encoder sees only the images; captions, and the names derived from them, are shown as context."
            : "This feature was never active on these samples.",
        ),
        feature.mapped ? h("div", { class: "toggle" }, overlay.node, key) : [],
        feature.top.length ? samples : [],
      ),
      bands.length
        ? h(
            "section",
            {},
            h("h2", {}, "Weaker samples"),
            h(
              "p",
              { class: "note" },
              "The strongest samples show a feature at its clearest. If these show something else, do not trust its name.",
            ),
            bands.map((band) => {
              const box = lazily(h("div", { class: "samples band" }), () => specimens(band.samples, false));
              return [
                h("h3", {}, `Around the ${Math.round(100 * band.at)}th percentile of its nonzero activations`),
                box,
              ];
            }).flat(),
          )
        : "",
      feature.histogram?.counts.some(Boolean) ? h(
        "section",
        {},
        h("h2", {}, "Activations"),
        histogram(feature.histogram),
      ) : "",
      others.length
        ? h(
            "section",
            {},
            h("h2", {}, "Best match in every other member"),
            h("p", { class: "note" }, "Over all layers of the other member. The best of many correlations is above 0 even by chance."),
            h(
              "ul",
              { class: "matches" },
              others.map(
                (other) => match(
                  at,
                  other,
                  {
                    rho: table.best[other].rho[n],
                    layer: table.best[other].layer[n],
                    feature: table.best[other].feature[n],
                  },
                ),
              ),
            ),
          )
        : "",
    ],
    update(query) {
      overlay.sync(query);
      drawOverlay().catch((error) => {
        if (!(error instanceof FileError)) throw error;
        key.hidden = false;
        key.replaceChildren(h("span", { class: "error" }, error.message));
      });
    },
  };
}
