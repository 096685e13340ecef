"""`vitpa sweep watch`: a sweep on one screen, with keys."""
