"""`python -m bench report`: one page with plots from committed JSON."""


def arguments(parser):
    pass


def main(options):
    pass
