"""Write the estimates of `conceptshare plan` into config/*.yaml, and of the paper's studies into its guide.

Run as `python docs/write_plans.py`.
"""

import re
from pathlib import Path

from conceptshare.config.study import load_study
from conceptshare.preflight.plan import Plan, Rates, cost_cells, headline, make_plan

CLONE = Path(__file__).parents[1]
CONFIGS = sorted((CLONE / "config").glob("*.yaml"))
GUIDE = CLONE / "docs" / "reproducing-the-paper.md"
BEGIN, END = "<!-- costs -->\n", "<!-- end of costs -->\n"


def plan_of(config: Path) -> Plan:
    """A study's estimate at the default rates, whatever of it is made here."""
    return make_plan(load_study(config), Rates(), results=CLONE / "no-such-folder")


def with_headline(text: str, plan: Plan) -> str:
    """A config's text with the line that says what the study costs."""
    return re.sub(r"^# conceptshare plan:.*$", f"# conceptshare plan: {headline(plan)}", text, count=1, flags=re.M)


def with_costs(text: str) -> str:
    """The guide's text with its table of costs replaced."""
    rows = ["| study | disk | read | FLOP | memory | hours |", "|---|---:|---:|---:|---:|---:|"]
    for config in CONFIGS:
        if config.stem == "decoder":  # not a study of the paper
            continue
        plan = plan_of(config)
        cells = " | ".join(cost_cells(plan.total(), plan.rates))
        rows.append(f"| [{plan.study}](../config/{config.name}) | {cells} |")
    table = "\n".join(rows)
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table}\n\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in CONFIGS:
        path.write_text(with_headline(path.read_text(encoding="utf-8"), plan_of(path)), encoding="utf-8")
    GUIDE.write_text(with_costs(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
