"""fusedloss: losses over large score matrices that are never stored."""

from . import distributed, nn, ranking, spherical, statistics
from ._version import __version__
from .information import info
from .losses import class_counts
from .losses.auc_loss import auc_loss
from .losses.bixse_loss import bixse_loss
from .losses.bpr_loss import bpr_loss
from .losses.circle_loss import circle_loss
from .losses.clip_loss import clip_loss
from .losses.comp_sum_loss import comp_sum_loss
from .losses.cosine_contrastive_loss import cosine_contrastive_loss
from .losses.cross_entropy import cross_entropy
from .losses.cwcl_loss import cwcl_loss
from .losses.focal_loss import focal_loss
from .losses.generalized_cross_entropy import generalized_cross_entropy
from .losses.info_nce_loss import info_nce_loss
from .losses.linear_cross_entropy import linear_cross_entropy
from .losses.linear_log_probs import LogProbs, linear_log_probs
from .losses.logit_adjusted_cross_entropy import logit_adjusted_cross_entropy
from .losses.margin_softmax_loss import margin_softmax_loss
from .losses.mean_absolute_error_loss import mean_absolute_error_loss
from .losses.multi_similarity_loss import multi_similarity_loss
from .losses.normalized_cross_entropy import normalized_cross_entropy
from .losses.nt_xent_loss import nt_xent_loss
from .losses.number_token_loss import number_token_loss
from .losses.one_vs_rest_loss import one_vs_rest_loss
from .losses.orthogonal_projection_loss import orthogonal_projection_loss
from .losses.pairwise_softmax_loss import pairwise_softmax_loss
from .losses.poly_focal_loss import poly_focal_loss
from .losses.poly_loss import poly_loss
from .losses.sigmoid_focal_loss import sigmoid_focal_loss
from .losses.sigmoid_loss import sigmoid_loss
from .losses.soft_info_nce_loss import soft_info_nce_loss
from .losses.spherical_softmax_loss import spherical_softmax_loss
from .losses.spherical_z_loss import spherical_z_loss
from .losses.squared_error_loss import squared_error_loss
from .losses.squentropy import squentropy
from .losses.supcon_loss import supcon_loss
from .losses.taylor_softmax_loss import taylor_softmax_loss
from .losses.triplet_loss import triplet_loss
from .memory import set_workspace_limit
from .numerics import nll, softplus
from .relation import Other, Rest, Same, Where
from .row_loss import row_loss
from .scores import Scores, linear_scores, logits_scores
from .similarity import similarity_scores
from .statistics import (
    Columns,
    Count,
    Expectation,
    LogSumExp,
    LogSumExpOf,
    Max,
    Min,
    Moments,
    Score,
    Sum,
    SumOf,
    SumOfSquares,
    TopK,
)
from .targets import check, set_strict
