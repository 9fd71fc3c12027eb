"""`Ready`: what stand-ins for plans have in common with plans that need nothing before they run."""


class Ready:
    """A plan that is certified on its own problem alone, with nothing to make for it before a run."""

    def on_harder_mask(self):
        return None

    def prepared(self, operands, ints, floats, room=None):
        return self
