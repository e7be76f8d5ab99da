// How well images and captions fit.

const fitLink = (fit) => link("fit", [fit.dataset, fit.sae, fit.name]);
const fitNamed = (name, at) => study.samples.filter(inSet(at)).find((fit) => fit.name === name);

const fitItem = (fit) =>
  h("li", anchor(fitLink(fit), fit.name), h("span.quiet", ` by features of ${fit.image} and ${fit.text}`));

function fitView(parts) {
  const [dataset, sae, name] = parts;
  const fit = found(fitNamed(name, { dataset, sae }), `There is no fit of samples “${plain(name)}”.`);
  const some = (title, list) =>
    section(
      title,
      lazily(h("div.samples"), () => specimens(fit, list)),
    );
  const layers = (numbers) => `${numbers.length > 1 ? "layers" : "layer"} ${numbers.join(", ")}`;
  return {
    title: `Fit of samples ${name}`,
    crumbs: [[`Fit of samples ${name}`, fitLink(fit)]],
    nodes: [
      h(
        "p.lead",
        `How well images and captions fit, by features of ${fit.image} (${layers(fit.image_layers)}) and of ` +
          `${fit.text} (${layers(fit.text_layers)}).`,
      ),
      h(
        "p.note",
        "The number of a sample is its ",
        term("fit"),
        ". Captions that belong to other images are among the worst; unusual samples are too.",
      ),
      some("Worst fit", fit.worst),
      some("Best fit", fit.best),
    ],
    update() {},
  };
}
