"""Modules: every loss once more, its parameters kept by a module.

loss = fusedloss.nn.FocalLoss(gamma=1.5)
loss(fusedloss.linear_scores(x, w), target)

Those between embeddings make their scores themselves, and keep what is learned with them: scale, bias, class vectors.

loss = fusedloss.nn.TripletLoss(margin=0.1)
loss(x, label)

Those on lists take scores and their relevance, and a mask or offsets where the lists are not of one length.

loss = fusedloss.nn.NeuralNDCGLoss(k=10)
loss(scores, relevance, mask=mask)

Soft sort and soft rank are no losses, but have a strength that may be learned: SoftSort, SoftRank.
"""

from ..losses.comp_sum_loss import comp_sum_loss
from ..losses.cross_entropy import cross_entropy
from ..losses.entmax15_loss import entmax15_loss
from ..losses.focal_loss import focal_loss
from ..losses.generalized_cross_entropy import generalized_cross_entropy
from ..losses.logit_adjusted_cross_entropy import logit_adjusted_cross_entropy
from ..losses.mean_absolute_error_loss import mean_absolute_error_loss
from ..losses.normalized_cross_entropy import normalized_cross_entropy
from ..losses.number_token_loss import number_token_loss
from ..losses.one_vs_rest_loss import one_vs_rest_loss
from ..losses.poly_focal_loss import poly_focal_loss
from ..losses.poly_loss import poly_loss
from ..losses.sigmoid_focal_loss import sigmoid_focal_loss
from ..losses.sparsemax_loss import sparsemax_loss
from ..losses.spherical_softmax_loss import spherical_softmax_loss
from ..losses.spherical_z_loss import spherical_z_loss
from ..losses.squared_error_loss import squared_error_loss
from ..losses.squentropy import squentropy
from ..losses.taylor_softmax_loss import taylor_softmax_loss
from .linear_cross_entropy import LinearCrossEntropyLoss
from .list_loss import (
    ADRMSELoss,
    ApproxNDCGLoss,
    GroCoLoss,
    KendallLoss,
    LambdaLoss,
    ListMLELoss,
    ListNetLoss,
    ListwisePointLoss,
    ListwisePoly1Loss,
    ListwiseSoftmaxLoss,
    NeuralNDCGLoss,
    PListMLELoss,
    RankNetLoss,
    SpearmanLoss,
)
from .loss import Loss
from .pair import (
    AUCLoss,
    BiXSELoss,
    BPRLoss,
    CircleLoss,
    ClipLoss,
    CosineContrastiveLoss,
    CWCLLoss,
    InfoNCELoss,
    MarginSoftmaxLoss,
    MultiSimilarityLoss,
    NTXentLoss,
    OrthogonalProjectionLoss,
    PairwiseSoftmaxLoss,
    SigmoidLoss,
    SoftInfoNCELoss,
    SupConLoss,
    TripletLoss,
)
from .sorting import SoftRank, SoftSort


class CompSumLoss(Loss, of=comp_sum_loss):
    pass


class CrossEntropyLoss(Loss, of=cross_entropy):
    pass


class Entmax15Loss(Loss, of=entmax15_loss):
    pass


class FocalLoss(Loss, of=focal_loss):
    pass


class GeneralizedCrossEntropyLoss(Loss, of=generalized_cross_entropy):
    pass


class LogitAdjustedCrossEntropyLoss(Loss, of=logit_adjusted_cross_entropy):
    pass


class MeanAbsoluteErrorLoss(Loss, of=mean_absolute_error_loss):
    pass


class NormalizedCrossEntropyLoss(Loss, of=normalized_cross_entropy):
    pass


class NumberTokenLoss(Loss, of=number_token_loss):
    pass


class OneVsRestLoss(Loss, of=one_vs_rest_loss):
    pass


class PolyFocalLoss(Loss, of=poly_focal_loss):
    pass


class PolyLoss(Loss, of=poly_loss):
    pass


class SigmoidFocalLoss(Loss, of=sigmoid_focal_loss):
    pass


class SparsemaxLoss(Loss, of=sparsemax_loss):
    pass


class SphericalSoftmaxLoss(Loss, of=spherical_softmax_loss):
    pass


class SphericalZLoss(Loss, of=spherical_z_loss):
    pass


class SquaredErrorLoss(Loss, of=squared_error_loss):
    pass


class SquentropyLoss(Loss, of=squentropy):
    pass


class TaylorSoftmaxLoss(Loss, of=taylor_softmax_loss):
    pass
