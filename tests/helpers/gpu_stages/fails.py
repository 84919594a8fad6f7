"""A stage that raises after its first row."""


def run(report, *, small):
    report.table("Done so far", ("what", "small"))
    report.row("first", small)
    raise ValueError("nothing fits | here\nat all")
