"""Where a token is in its image, audio or video, as one int64: its position there, and the frame, row and column that it stands for.

Bits 0 to 19 are the position: 1 for the begin token, 0 outside of spans. Of codes, bits 20 to 34 are the frame, 35 to 48 the row and 49 to 62
the column, each counted from 1; of what stands before them they are 0. An image has one frame; audio has a frame per unit of its codes, and
a row per level. Larger numbers begin again at 0. So everything that hands positions on hands on one number per token.
"""

POSITION = (1 << 20) - 1
#: Where frame, row and column begin, and what they are at most.
AXES = ((20, (1 << 15) - 1), (35, (1 << 14) - 1), (49, (1 << 14) - 1))
