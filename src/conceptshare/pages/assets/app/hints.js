// What symbols mean: a hint on hover and on keyboard focus.

const MEANINGS = {
  S: "Strength of a feature: its activation summed over the samples.",
  Density: "Share of the samples on which the feature is above zero.",
  "ρ": "A feature’s best correlation, over the samples, with a feature of another member. The best of many is above 0 even by chance.",
  wMPPC: "The mean of ρ over a member’s features, weighted by S: 1 if each has a perfect match.",
  null: "The same with samples re-paired at random: what chance alone gives.",
  excess: "(wMPPC − null) / (1 − null): 0 is chance, 1 a perfect match.",
  FVU: "Fraction of the global tokens’ variance that an SAE leaves unexplained: 0 is perfect, predicting the mean gives 1.",
  "Δ": "Comparative Sharedness: S times the difference of the squared matches in two groups of members.",
  fit: "How much more a sample’s features in both encoders agree than those of two samples, in standard deviations: 0 is chance.",
  "Name z": "How far the words of the name stand out in the captions of the strongest samples, in standard deviations.",
  "Name AUC": "How well the name predicts the feature on other samples: 0.5 is chance, 1 is perfect.",
};

const hinted = (hint) => ({ "data-hint": hint, "aria-description": hint });
/** A symbol with its hint. */
const term = (symbol, shown = symbol) => h("span.term", { tabindex: "0", ...hinted(MEANINGS[symbol]) }, shown);

const bubble = h("div.hint", { "aria-hidden": "true", hidden: true });

function showHint({ target }) {
  const owner = target.closest?.("[data-hint]");
  bubble.hidden = !owner;
  if (!owner) return;
  bubble.textContent = owner.dataset.hint;
  const { left, bottom } = owner.getBoundingClientRect();
  const { width } = bubble.getBoundingClientRect();
  const room = document.documentElement.clientWidth - width - 8;
  bubble.style.left = `${Math.max(8, Math.min(left, room)) + window.scrollX}px`;
  bubble.style.top = `${bottom + 4 + window.scrollY}px`;
}

const hideHint = () => (bubble.hidden = true);

document.addEventListener("DOMContentLoaded", () => document.body.append(bubble));
document.addEventListener("pointerover", showHint);
document.addEventListener("focusin", (event) => event.target.matches(":focus-visible") && showHint(event));
document.addEventListener("focusout", hideHint);
document.addEventListener("keydown", ({ key }) => key === "Escape" && hideHint());
window.addEventListener("hashchange", hideHint);
