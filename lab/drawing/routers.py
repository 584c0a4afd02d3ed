"""The README's table of routers, printed from their traits: python -m lab.drawing.routers"""
from routers import ROUTERS


def router_table():
    """The table in Markdown."""
    lines = ["| `ffn.router` | paper | gate | besides |", "|---|---|---|---|"]
    for name, router in ROUTERS.items():
        t = router.traits
        besides = [(t.noise, "noise"), (t.ahead, f"ahead {t.ahead}"), (t.across, f"across {t.across}"),
                   (not t.compiles, "never compiled")]
        text = ", ".join(text for true, text in besides if true) or "-"
        lines.append(f"| `{name}` | {t.paper} | {t.gate} | {text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(router_table())
