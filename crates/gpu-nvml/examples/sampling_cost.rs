//! What it costs to look at eight GPUs of the stand-in library as the daemon does, as a share of one core: the CPU time that
//! the kernel counts for each thread over some time. `sampling_cost [SECONDS]`
#![expect(clippy::print_stdout, reason = "its output is for people")]

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use gpu_nvml::{NvmlGpus, Opening, Options};
use nvml_standin::{Installed, Script};

/// Nanoseconds on a CPU of each thread of this process, by its number, with its name.
fn spent() -> Result<BTreeMap<OsString, (String, u64)>, Box<dyn Error>> {
    let mut threads = BTreeMap::new();
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?;
        let dir = task.path();
        let name = std::fs::read_to_string(dir.join("comm"))?.trim().to_owned();
        let times = std::fs::read_to_string(dir.join("schedstat"))?;
        threads.insert(task.file_name(), (name, times.split_whitespace().next().unwrap_or("0").parse()?));
    }
    Ok(threads)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let seconds = std::env::args().nth(1).map_or(Ok(30), |text| text.parse::<u32>())?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nvml-standin/topologies/eight-nvlink.toml");
    let script = Script::parse(&std::fs::read_to_string(file)?)?;
    let dir = tempfile::tempdir()?;
    let library = Installed::into_dir(dir.path(), &script)?.library();
    let gpus = NvmlGpus::start(Options { library: Some(library), ..Options::default() })?;
    gpus.opening().wait_for(|opening| *opening == Opening::Done).await?;
    let before = spent()?;
    tokio::time::sleep(Duration::from_secs(seconds.into())).await;
    let mut sum = 0.0;
    for (thread, (name, after)) in spent()? {
        let before = before.get(&thread).map_or(0, |(_, before)| *before);
        let share = f64::from(u32::try_from((after - before) / 1_000)?) / f64::from(seconds) / 1e4;
        if name.starts_with("nvml") {
            sum += share;
        }
        println!("{name:<16} {share:.4} % of a core");
    }
    println!("{:<16} {sum:.4} % of a core, eight GPUs, every second", "nvml together");
    Ok(())
}
