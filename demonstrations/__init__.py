"""Demonstrations: the closed-loop expert, the recorder, the reader."""
