"""A stage that says how many ranks it was told of."""


def run(report, *, small, ranks):
    report.note(f"{ranks} ranks, small {small}")
