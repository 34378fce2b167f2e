"""Numbers that stand for names in what a kernel is specialised on: tuples of integers."""

import triton.language as tl

# A statistic is described by a tuple; these are its places.
KIND = tl.constexpr(0)
FUNCTION = tl.constexpr(1)  # of EXPECTATION and SUM_OF
REST = tl.constexpr(2)  # 1: one column of each row is left out
OPERAND = tl.constexpr(3)  # NONE, VECTOR or MATRIX
ROW = tl.constexpr(4)  # 1: there is a row parameter
COUNT = tl.constexpr(5)  # columns wanted (SCORE), k (EXTREME), else 1
SLOTS = tl.constexpr(6)  # the next power of two
SHARED = tl.constexpr(7)  # 1: the columns wanted are the same for all rows

# A statistic's arguments are a tuple; these are its places.
STATE = tl.constexpr(0)
COLUMN_LEFT_OUT = tl.constexpr(1)  # (rows,) int64
VALUES = tl.constexpr(2)  # the operand
VALUES_STRIDE = tl.constexpr(3)
PARAMETER_OF_ROW = tl.constexpr(4)  # (rows,) fp32
AT = tl.constexpr(5)  # SCORE: the wanted columns, int64, (rows, COUNT) or SHARED (COUNT,)
FACTOR = tl.constexpr(6)
PARAMETER = tl.constexpr(7)
COEFFICIENT = tl.constexpr(8)  # ∂L/∂value, (rows, outputs)

# KIND                                state (float64 per row; merged into, so it starts from the identity)
SCORE = tl.constexpr(0)  # [COUNT]    z at the wanted columns
LOGSUMEXP = tl.constexpr(1)  # [2]    m, Σ exp(factor z − m)
SUM = tl.constexpr(2)  # [1]          Σ v z
COUNT_SEEN = tl.constexpr(3)  # [1]   number of columns whose v is not 0
SUM_OF_SQUARES = tl.constexpr(4)  # [1]
MOMENTS = tl.constexpr(5)  # [3]      count, mean, Σ (z − mean)²
EXPECTATION = tl.constexpr(6)  # [3]  m, Σ exp(factor z − m), Σ exp(factor z − m) v
SUM_OF = tl.constexpr(7)  # [2]       Σ f(u), Σ f′(u), u = factor (z − row)
EXTREME = tl.constexpr(8)  # [2 COUNT] the COUNT largest factor·z: their z, then their columns

# FUNCTION of EXPECTATION: what v is
OF_OPERAND = tl.constexpr(0)
OF_SCORE = tl.constexpr(1)
OF_DISTANCE = tl.constexpr(2)  # |operand − row|
OF_SQUARE = tl.constexpr(3)  # (operand − row)²

# FUNCTION of SUM_OF
SOFTPLUS = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
HINGE = tl.constexpr(2)
SQUARED_HINGE = tl.constexpr(3)
FOCAL = tl.constexpr(4)

# OPERAND
NONE = tl.constexpr(0)
VECTOR = tl.constexpr(1)
MATRIX = tl.constexpr(2)

# How raw scores become scores is described by a tuple of 0 or 1; these are its places.
BIAS = tl.constexpr(0)
CLASS_SCALE = tl.constexpr(1)
CLASS_SHIFT = tl.constexpr(2)
SOFTCAP = tl.constexpr(3)
SCALE = tl.constexpr(4)  # NONE, a NUMBER, or a number in MEMORY

NUMBER = tl.constexpr(1)
MEMORY = tl.constexpr(2)

# Which sums a gradient gathers is described by a tuple of 0 or 1; these are its places.
TO_BIAS = tl.constexpr(0)
TO_CLASS_SCALE = tl.constexpr(1)
TO_CLASS_SHIFT = tl.constexpr(2)
TO_SCALE = tl.constexpr(3)
TO_LARGEST = tl.constexpr(4)
