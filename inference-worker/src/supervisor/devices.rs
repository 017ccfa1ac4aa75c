//! The CUDA devices that a pod's ranks need, one each.

use llama_contract::{Device, FailureCategory, LaunchArgs};
use llama_model::MemoryPlan;
use llama_model::device::cuda::{self, CudaError, Survey};

use crate::comm::nccl::{self, NcclError};
use crate::failure::Failure;

/// What context, communication and activations take of a device.
pub(crate) const RUNTIME_BYTES: u64 = 3 << 30;
/// Hundredths of a device's memory that may be used; the driver keeps some.
const USABLE_PERCENT: u64 = 92;
const MIB: u64 = 1 << 20;

/// Bytes that each rank of this pod has on its device; `None` where ranks compute on
/// CPU cores.
///
/// # Errors
/// `InvalidConfiguration` when this build or this machine has not what the ranks need.
pub(super) fn memory(launch: &LaunchArgs, ranks_here: u32) -> Result<Option<u64>, Failure> {
    match launch.device {
        Device::Cpu => Ok(None),
        Device::Cuda => {
            let ranks = (ranks_here as usize, launch.ranks() as usize);
            judge(cuda::survey(), nccl::BUILT, ranks)
                .map(Some)
                .map_err(|what| Failure::new(FailureCategory::InvalidConfiguration, what))
        }
    }
}

/// Whether what a machine has is enough for `here` ranks of a group of `all`.
fn judge(
    survey: Result<Survey, CudaError>,
    has_nccl: bool,
    (here, all): (usize, usize),
) -> Result<u64, String> {
    let devices = match survey {
        Ok(survey) => survey.memory,
        Err(error @ CudaError::NotBuilt) => {
            return Err(format!(
                "{error}; use --device=cpu or a worker image with CUDA"
            ));
        }
        Err(error) => {
            return Err(format!(
                "{error}; run on a node with a GPU, or use --device=cpu"
            ));
        }
    };
    if devices.len() < here {
        return Err(format!(
            "{here} ranks of this pod need a CUDA device each, the driver shows {}",
            devices.len()
        ));
    }
    if all > 1 && !has_nccl {
        return Err(NcclError::NotBuilt.to_string());
    }
    let smallest = devices.into_iter().take(here).min().unwrap_or(0);
    Ok(usable(smallest))
}

/// Bytes that ranks may use of a device of `memory` bytes.
pub(crate) fn usable(memory: u64) -> u64 {
    memory / 100 * USABLE_PERCENT
}

/// Sequences that fit devices of `limit` usable bytes, at least one.
///
/// # Errors
/// `InsufficientMemory` with the numbers.
pub(super) fn sequences(plan: &MemoryPlan, limit: u64) -> Result<usize, Failure> {
    match plan.sequences_within_each(limit, plan.max_tokens) {
        0 => Err(Failure::new(
            FailureCategory::InsufficientMemory,
            refusal(plan, limit),
        )),
        sequences => Ok(sequences),
    }
}

fn refusal(plan: &MemoryPlan, limit: u64) -> String {
    let mib = |bytes: u64| bytes.div_ceil(MIB);
    let each = |rank: &llama_model::memory::RankPlan| {
        let kv = rank.kv_bytes(plan.max_tokens, plan.chunk);
        (
            rank.weights + kv + rank.reserve,
            rank.weights,
            kv,
            rank.reserve,
        )
    };
    let (needed, weights, kv, reserve) = plan.ranks.iter().map(each).max().unwrap_or_default();
    let shorter = match plan.tokens_within_each(limit) {
        0 => String::new(),
        tokens => format!("; sequences of {tokens} tokens would fit"),
    };
    format!(
        "needs {} MiB on each device (weights {} MiB, KV cache of one sequence of {} tokens {} MiB, reserve {} MiB), of the smallest {} MiB are usable{shorter}",
        mib(needed),
        mib(weights),
        plan.max_tokens,
        mib(kv),
        mib(reserve),
        limit / MIB,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_in_one_line() {
        let devices = |count: usize| {
            Ok(Survey {
                memory: vec![80 << 30; count],
            })
        };
        let none = || {
            Err(CudaError::NoDevice(
                "no CUDA-capable device is detected".to_owned(),
            ))
        };
        for (survey, has_nccl, ranks, expected) in [
            (
                Err(CudaError::NotBuilt),
                false,
                (1, 1),
                "this worker is built without CUDA; use --device=cpu or a worker image with CUDA",
            ),
            (
                none(),
                true,
                (1, 1),
                "no CUDA device: the driver libcuda.so.1 says \"no CUDA-capable device is detected\"; run on a node with a GPU, or use --device=cpu",
            ),
            (
                devices(1),
                true,
                (2, 2),
                "2 ranks of this pod need a CUDA device each, the driver shows 1",
            ),
            (
                devices(2),
                false,
                (2, 2),
                "this worker is built without NCCL, by which ranks on CUDA devices exchange their sums; use a worker image with NCCL",
            ),
        ] {
            assert_eq!(judge(survey, has_nccl, ranks), Err(expected.to_owned()));
        }
    }

    #[test]
    fn the_smallest_device_that_a_rank_gets_counts() {
        let survey = Survey {
            memory: vec![8000, 5000, 100],
        };
        assert_eq!(judge(Ok(survey.clone()), true, (2, 4)), Ok(4600));
        assert_eq!(judge(Ok(survey), false, (1, 1)), Ok(7360));
    }
}
