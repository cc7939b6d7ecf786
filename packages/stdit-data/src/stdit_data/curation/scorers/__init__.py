"""Scores of a clip: each file measures one property, from frames that all scorers share.

A scorer is a function from `ClipFrames` to values by column; None where a clip has no such value, as an image has no
motion. Frames come at 2 a second (by default), 256 pixels on the longer side; "a pair" is two neighbours of them.
"""
