// policy_metrics: the slots of policy_loss's metrics, in the order of pyllmtune/losses/metrics.py.
#pragma once

namespace pyllmtune {

enum PolicyMetric : int {
  kTokens,
  kSequences,
  kDropped,
  kLoss,
  kClippedLow,
  kClippedHigh,
  kClippedCap,
  kApproxKl,
  kApproxKlK3,
  kKlRef,
  kRatio,
  kRatioSquared,
  kEntropy,
  kWeight,
  kNegativeRatioMin,
  kRatioMax,
  kMetrics
};
constexpr int kMetricSums = kNegativeRatioMin;  // those from here on are maxima

}  // namespace pyllmtune
