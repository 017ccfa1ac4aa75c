//! What a user sets, with the defaults of the design and the reason of each.

use serde::{Deserialize, Serialize};

use crate::model::{Coefficients, LLAMA_405B_TP8, Limits, Mix, Slo};

/// Settings of one model's autoscaler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    /// Least number of groups. 0 lets an idle model go to zero.
    pub min: u32,
    /// Greatest number of groups.
    pub max: u32,
    /// Greatest number of GPUs of all groups, `None` without such a limit.
    pub max_gpus: Option<u32>,
    /// GPUs of one group, for `max_gpus`.
    pub gpus_per_group: u32,
    /// What is assumed of the engine until it is learned.
    pub prior: Coefficients,
    /// Limits of the engine.
    pub limits: Limits,
    /// Times that requests are to keep.
    pub slo: Slo,
    /// What is assumed of requests until some were seen.
    pub mix: Mix,
    /// Whether a gateway counts arrivals. Without one they are estimated from the engines, and
    /// the model never goes to zero. With one that does not answer, nothing is scaled down.
    pub gateway: bool,
    /// Seconds from a group's creation to its first request, until starts were seen (L).
    pub cold_start_s: f64,
    /// Share of a group's capacity that is filled at first (ρ0).
    pub rho: f64,
    /// Share of requests that are to keep the SLO; moves ρ.
    pub slo_target: f64,
    /// How much of a rising trend is believed (φ).
    pub trend: f64,
    /// Which quantile of past errors of the forecast is added to it (qtl).
    pub margin_quantile: f64,
    /// How many standard deviations of demand in 10 s windows are added (β).
    pub burst: f64,
    /// Share of a group's sequences at the ITL limit that may be in use (κ).
    pub slots: f64,
    /// Seconds in which work that queues is to be done once groups have started (`T_drain`).
    pub drain_queue_s: f64,
    /// Seconds over which the greatest number wanted counts (`W_down`); `None`:
    /// max(600, 2 L), at most 1800.
    pub stabilization_s: Option<f64>,
    /// Greatest number of groups added within a cold start, `None`: as many as there are, and
    /// at least 4.
    pub max_surge: Option<u32>,
    /// How many groups may drain at once.
    pub drain_slots: u32,
    /// Seconds without a request after which the last group goes, where `min` is 0; at least
    /// as long as a cold start and 600 (ski rental: at most twice the best cost).
    pub retention_s: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            min: 1,
            max: 8,
            max_gpus: None,
            gpus_per_group: 8,
            prior: LLAMA_405B_TP8.coefficients,
            limits: LLAMA_405B_TP8.limits,
            slo: Slo {
                ttft_s: 6.0,
                itl_ms: 175.0,
            },
            mix: Mix {
                prompt: 1000.0,
                output: 200.0,
                cache_hit: 0.0,
            },
            gateway: true,
            cold_start_s: 300.0,
            rho: 0.80,
            slo_target: 0.99,
            trend: 0.5,
            margin_quantile: 0.90,
            burst: 1.0,
            slots: 0.5,
            drain_queue_s: 120.0,
            stabilization_s: None,
            max_surge: None,
            drain_slots: 4,
            retention_s: 600.0,
        }
    }
}

/// A setting that cannot be worked with.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SettingsError {
    /// `min` is above `max`, or above what `max_gpus` allows.
    #[error("min is {min}, and no more than {max} groups are allowed by max and maxGpus")]
    MinAboveMax {
        /// The setting `min`.
        min: u32,
        /// The lesser of `max` and `max_gpus` / `gpus_per_group`.
        max: u32,
    },
    /// A number is outside the range that makes sense.
    #[error("{field} is {value}, expected {expected}")]
    OutOfRange {
        /// Path of the setting.
        field: &'static str,
        /// What was set.
        value: f64,
        /// The range, in words.
        expected: &'static str,
    },
}

impl SettingsError {
    /// A word for metrics and conditions.
    pub fn category(&self) -> &'static str {
        match self {
            Self::MinAboveMax { .. } => "min_above_max",
            Self::OutOfRange { .. } => "out_of_range",
        }
    }
}

impl Settings {
    /// The greatest number of groups by `max` and `max_gpus`.
    pub fn most(&self) -> u32 {
        let by_gpus = self
            .max_gpus
            .map_or(u32::MAX, |gpus| gpus / self.gpus_per_group.max(1));
        self.max.min(by_gpus)
    }

    /// Tells the first setting that cannot be worked with.
    pub fn check(&self) -> Result<(), SettingsError> {
        if self.min > self.most() {
            return Err(SettingsError::MinAboveMax {
                min: self.min,
                max: self.most(),
            });
        }
        let positive = "a number above 0";
        let share = "a number above 0 and at most 1";
        for (field, value, expected) in [
            ("max", f64::from(self.max), positive),
            ("gpusPerGroup", f64::from(self.gpus_per_group), positive),
            ("prior.stepMs", self.prior.step_ms, positive),
            ("prior.promptTokenMs", self.prior.prompt_token_ms, positive),
            ("prior.sequenceMs", self.prior.sequence_ms, positive),
            ("prior.kvKilotokenMs", self.prior.kv_kilotoken_ms, positive),
            ("limits.kvTokens", self.limits.kv_tokens, positive),
            ("limits.sequences", self.limits.sequences, positive),
            ("limits.stepTokens", self.limits.step_tokens, positive),
            ("slo.ttftS", self.slo.ttft_s, positive),
            ("slo.itlMs", self.slo.itl_ms, positive),
            ("mix.prompt", self.mix.prompt, positive),
            ("mix.output", self.mix.output, positive),
            ("coldStartS", self.cold_start_s, positive),
            ("drainQueueS", self.drain_queue_s, positive),
            (
                "stabilizationS",
                self.stabilization_s.unwrap_or(1.0),
                positive,
            ),
            ("drainSlots", f64::from(self.drain_slots), positive),
            ("rho", self.rho, share),
            ("sloTarget", self.slo_target, share),
            ("marginQuantile", self.margin_quantile, share),
            ("slots", self.slots, share),
        ] {
            let in_range = value.is_finite() && value > 0.0 && (expected != share || value <= 1.0);
            if !in_range {
                return Err(SettingsError::OutOfRange {
                    field,
                    value,
                    expected,
                });
            }
        }
        for (field, value) in [
            ("trend", self.trend),
            ("burst", self.burst),
            ("retentionS", self.retention_s),
            ("mix.cacheHit", self.mix.cache_hit),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                let expected = "a number of at least 0";
                return Err(SettingsError::OutOfRange {
                    field,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_can_be_worked_with() {
        assert_eq!(Settings::default().check(), Ok(()));
    }

    #[test]
    fn a_bad_setting_is_named() {
        let gpus = Settings {
            min: 3,
            max: 8,
            max_gpus: Some(16),
            ..Settings::default()
        };
        assert_eq!(
            gpus.check(),
            Err(SettingsError::MinAboveMax { min: 3, max: 2 })
        );
        let nan = Settings {
            rho: f64::NAN,
            ..Settings::default()
        };
        let error = nan.check().unwrap_err();
        assert_eq!(error.category(), "out_of_range");
        assert_eq!(
            error.to_string(),
            "rho is NaN, expected a number above 0 and at most 1"
        );
        let trend = Settings {
            trend: -0.1,
            ..Settings::default()
        };
        assert_eq!(
            trend.check().unwrap_err().to_string(),
            "trend is -0.1, expected a number of at least 0"
        );
    }
}
