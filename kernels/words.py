"""Numbers that stand for names in what a kernel is specialised on: tuples of integers."""

import triton.language as tl

# A statistic is described by a tuple; these are its places.
KIND = tl.constexpr(0)
FUNCTION = tl.constexpr(1)  # of EXPECTATION, SUM_OF and LOGSUMEXP_OF
REST = tl.constexpr(2)  # 1: one column of each row is left out
OPERAND = tl.constexpr(3)  # NONE, VECTOR or MATRIX
ROW = tl.constexpr(4)  # 1: there is a row parameter
COUNT = tl.constexpr(5)  # columns wanted (SCORE), k (EXTREME), else 1
SLOTS = tl.constexpr(6)  # the next power of two
SHARED = tl.constexpr(7)  # 1: the columns wanted are the same for all rows
LABELS = tl.constexpr(8)  # NONE, or columns count whose label is the row's (SAME) or is not (OTHER)
ABOVE = tl.constexpr(9)  # 1: scores count that are above a threshold of the row
BELOW = tl.constexpr(10)  # 1: the same, below

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
LABEL_OF_ROW = tl.constexpr(9)  # (rows,) int64
LABEL_OF_COLUMN = tl.constexpr(10)  # (columns,) int64
LOW = tl.constexpr(11)  # (rows,) fp32: scores count that are > it
HIGH = tl.constexpr(12)  # (rows,) fp32: scores count that are < it
WEIGHT = tl.constexpr(13)  # of LOGSUMEXP_OF

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
LOGSUMEXP_OF = tl.constexpr(9)  # [3] m, Σ e, Σ e g′(u), e = exp(weight g(u) − m), u = factor (z − row)

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

# FUNCTION of LOGSUMEXP_OF
LOG_TANH = tl.constexpr(0)
LOG_ATAN = tl.constexpr(1)
LOG_RELU = tl.constexpr(2)
CIRCLE = tl.constexpr(3)

# LABELS
SAME = tl.constexpr(1)
OTHER = tl.constexpr(2)

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
TRANSPOSED = tl.constexpr(5)  # 1: rows of the kernel are columns in memory, and classes

NUMBER = tl.constexpr(1)
MEMORY = tl.constexpr(2)

# Which sums a gradient gathers is described by a tuple of 0 or 1; these are its places.
TO_BIAS = tl.constexpr(0)
TO_CLASS_SCALE = tl.constexpr(1)
TO_CLASS_SHIFT = tl.constexpr(2)
TO_SCALE = tl.constexpr(3)
TO_LARGEST = tl.constexpr(4)
