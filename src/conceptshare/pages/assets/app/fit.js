// How well images and captions fit.

const signed = (value) => value.toFixed(2).replace("-", "−");

const fitLink = (fit) => link("fit", [fit.dataset, fit.sae, fit.name]);
const fitNamed = (name, at) => study.samples.filter(inSet(at)).find((fit) => fit.name === name);

const layersOf = (numbers) => `${numbers.length > 1 ? "layers" : "layer"} ${numbers.join(", ")}`;
const fitMembers = (fit) =>
  `by features of ${fit.image} (${layersOf(fit.image_layers)}) and of ${fit.text} (${layersOf(fit.text_layers)})`;
const fitItem = (fit) => h("li", anchor(fitLink(fit), fit.name), h("span.quiet", ` ${fitMembers(fit)}`));

function fitView(parts) {
  const [dataset, sae, name] = parts;
  const fit = found(fitNamed(name, { dataset, sae }), `There is no fit of samples “${plain(name)}”.`);
  const some = (title, list) =>
    section(
      title,
      lazily(h("div.samples"), () => specimens(fit, list, null, signed)),
    );
  return {
    title: `Fit of samples: ${name}`,
    crumbs: [[`Fit of samples: ${name}`, fitLink(fit)]],
    nodes: [
      h("p.lead", `How well images and captions fit, ${fitMembers(fit)}.`),
      h(
        "p.note",
        "Above each caption is the sample’s ",
        term("fit"),
        ": how much more its features in both encoders agree than those of two samples, in standard deviations. It is " +
          "about 0 for a caption that fits no better than another’s. Captions that belong to other images are among the " +
          "worst; unusual samples are too.",
      ),
      Object.values(fit.unexplained).flat().length > 0 &&
        h(
          "p.note",
          "Among them are ",
          ...unexplained(fit),
          ": ",
          Object.entries(fit.unexplained)
            .filter(([, layers]) => layers.length)
            .map(([member, layers]) => `${member}, ${layersOf(layers)}`)
            .join("; "),
          ".",
        ),
      some("Worst fit", fit.worst),
      some("Best fit", fit.best),
    ],
    update() {},
  };
}
