//! Words of engines and the class they mean. Nothing else is to be known of an engine kind here.

use pool_domain::FailureClass;

/// Texts that stand in one line of the log, in lower case, and the class they mean together. The first pattern that is found
/// decides: what caused another stands before it.
#[derive(Debug)]
pub(crate) struct Pattern(pub(super) &'static [&'static str], pub(super) FailureClass);

const LOST: FailureClass = FailureClass::GpuLost;
const DRIVER: FailureClass = FailureClass::DriverError;
const VRAM: FailureClass = FailureClass::VramOom;
const PORT: FailureClass = FailureClass::PortConflict;
const ARTIFACT: FailureClass = FailureClass::Artifact;
const CONFIG: FailureClass = FailureClass::Config;

/// The device is gone for whoever asks.
const CUDA_LOST: &[Pattern] = &[
    Pattern(&["fallen off the bus"], LOST),
    Pattern(&["gpu is lost"], LOST),
    Pattern(&["nvml_error_gpu_is_lost"], LOST),
    Pattern(&["cuda_error_device_unavailable"], LOST),
    Pattern(&["cudaerrordevicesunavailable"], LOST),
    Pattern(&["cuda-capable device(s) is/are busy or unavailable"], LOST),
    Pattern(&["cuda-capable devices are busy or unavailable"], LOST),
];

/// Of CUDA itself, and of PyTorch.
const CUDA_MEMORY: &[Pattern] = &[
    Pattern(&["cuda out of memory"], VRAM),
    Pattern(&["cuda error", "out of memory"], VRAM),
    Pattern(&["cuda runtime error", "out of memory"], VRAM),
    Pattern(&["cuda_error_out_of_memory"], VRAM),
    Pattern(&["outofmemoryerror"], VRAM),
    Pattern(&["cublas_status_alloc_failed"], VRAM),
];

const PORTS: &[Pattern] = &[
    Pattern(&["address already in use"], PORT),
    Pattern(&["addrinuse"], PORT),
    Pattern(&["couldn't bind"], PORT),
    Pattern(&["socket", "already in use"], PORT),
];

/// This program and this device never fit together.
const BUILD: &[Pattern] = &[
    Pattern(&["no kernel image is available for execution"], CONFIG),
    Pattern(&["has no device code compatible with cuda arch"], CONFIG),
];

/// Whatever else CUDA, NCCL or the driver complain of.
const CUDA_OTHER: &[Pattern] = &[
    Pattern(&["cuda driver version is insufficient"], DRIVER),
    Pattern(&["driver/library version mismatch"], DRIVER),
    Pattern(&["uncorrectable ecc error"], DRIVER),
    Pattern(&["cuda error"], DRIVER),
    Pattern(&["cuda runtime error"], DRIVER),
    Pattern(&["cuda failure"], DRIVER),
    Pattern(&["cuda kernel errors might be asynchronously"], DRIVER),
    Pattern(&["unhandled cuda error"], DRIVER),
    Pattern(&["cublas_status_"], DRIVER),
];

/// Said also by one that goes on without a device and ends for another reason.
const CUDA_NONE: &[Pattern] =
    &[Pattern(&["no cuda-capable device is detected"], LOST), Pattern(&["no cuda gpus are available"], LOST)];

const LLAMA_CPP: &[Pattern] = &[
    Pattern(&["cudamalloc failed: out of memory"], VRAM),
    Pattern(&["invalid magic character"], ARTIFACT),
    Pattern(&["unknown model architecture"], ARTIFACT),
    Pattern(&["gguf_init_from_reader: failed to read"], ARTIFACT),
    Pattern(&["failed to open gguf file"], ARTIFACT),
    Pattern(&["model is corrupted or incomplete"], ARTIFACT),
    Pattern(&["error: invalid argument"], CONFIG),
    Pattern(&["error while handling argument"], CONFIG),
    Pattern(&["error while handling environment variable"], CONFIG),
];

/// Models of Hugging Face, as transformers and safetensors speak of them.
const HUGGING_FACE: &[Pattern] = &[
    Pattern(&["safetensorerror"], ARTIFACT),
    Pattern(&["does not appear to have a file named"], ARTIFACT),
    Pattern(&["is not a local folder and is not a valid model identifier"], ARTIFACT),
    Pattern(&["repositorynotfounderror"], ARTIFACT),
    Pattern(&["hfvalidationerror"], ARTIFACT),
    Pattern(&["but transformers does not recognize this architecture"], ARTIFACT),
];

/// Python's argparse and click, Rust's clap, getopt.
const FLAGS: &[Pattern] = &[
    Pattern(&["error: unrecognized arguments"], CONFIG),
    Pattern(&["error: argument ", "invalid"], CONFIG),
    Pattern(&["error: argument ", "expected"], CONFIG),
    Pattern(&["error: no such option"], CONFIG),
    Pattern(&["error: invalid value for"], CONFIG),
    Pattern(&["error: unexpected argument"], CONFIG),
    Pattern(&["error: invalid value"], CONFIG),
    Pattern(&["unrecognized option"], CONFIG),
];

const VLLM: &[Pattern] = &[
    Pattern(&["no available memory for the cache blocks"], VRAM),
    Pattern(&["free memory on device", "less than desired gpu memory utilization"], VRAM),
    Pattern(&["larger than the available kv cache memory"], VRAM),
    Pattern(&["larger than the maximum number of tokens that can be stored in kv cache"], VRAM),
];

const SGLANG: &[Pattern] = &[
    Pattern(&["not enough memory. please try to increase --mem-fraction-static"], VRAM),
    Pattern(&["out of memory. please set a smaller number for"], VRAM),
];

const TGI: &[Pattern] = &[Pattern(&["not enough memory to handle", "prefill tokens"], VRAM)];

const TRT_LLM: &[Pattern] = &[
    Pattern(&["the engine plan file is not compatible with this version of tensorrt"], ARTIFACT),
    Pattern(&["error opening engine file"], ARTIFACT),
    Pattern(&["failed to deserialize cuda engine"], ARTIFACT),
];

const TRITON: &[Pattern] =
    &[Pattern(&["failed to poll model repository"], ARTIFACT), Pattern(&["failed to stat file", "model"], ARTIFACT)];

#[cfg(test)]
pub(super) const ALL: &[&[Pattern]] = &[
    CUDA_LOST,
    CUDA_MEMORY,
    PORTS,
    BUILD,
    CUDA_OTHER,
    CUDA_NONE,
    LLAMA_CPP,
    HUGGING_FACE,
    FLAGS,
    VLLM,
    SGLANG,
    TGI,
    TRT_LLM,
    TRITON,
];

/// The patterns of a kind, by its word in the config.
pub(super) fn of(kind: &str) -> &'static [&'static [Pattern]] {
    match kind {
        "vllm" => &[CUDA_LOST, VLLM, CUDA_MEMORY, PORTS, BUILD, CUDA_OTHER, HUGGING_FACE, FLAGS, CUDA_NONE],
        "sglang" => &[CUDA_LOST, SGLANG, CUDA_MEMORY, PORTS, BUILD, CUDA_OTHER, HUGGING_FACE, FLAGS, CUDA_NONE],
        "tgi" => &[CUDA_LOST, TGI, CUDA_MEMORY, PORTS, BUILD, CUDA_OTHER, HUGGING_FACE, FLAGS, CUDA_NONE],
        "tensorrt-llm" => &[CUDA_LOST, CUDA_MEMORY, PORTS, BUILD, CUDA_OTHER, TRT_LLM, HUGGING_FACE, FLAGS, CUDA_NONE],
        "triton" => &[CUDA_LOST, CUDA_MEMORY, PORTS, BUILD, CUDA_OTHER, TRT_LLM, TRITON, FLAGS, CUDA_NONE],
        "stub" => &[CUDA_LOST, CUDA_MEMORY, PORTS, CUDA_OTHER, FLAGS],
        _ => &[CUDA_LOST, CUDA_MEMORY, PORTS, BUILD, CUDA_OTHER, LLAMA_CPP, CUDA_NONE],
    }
}
