//! What a node has to have before engines run well on it: a report, in which each line says what was found, what is needed and
//! what would help. This half looks at devices; adapters add their own.

use pool_domain::device::Verdict;

use crate::ports::Inventory;

/// How one line of the report came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// As it should be.
    Fine,
    /// It works, but not as well as it could.
    Weak,
    /// Engines will not run.
    Broken,
}

impl Outcome {
    /// The outcome as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Fine => "ok",
            Self::Weak => "weak",
            Self::Broken => "broken",
        }
    }
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// How it came out.
    pub outcome: Outcome,
    /// What is there, with its version where it has one.
    pub found: String,
    /// What to do; empty where there is nothing to do.
    pub remedy: String,
}

impl Finding {
    /// As it should be.
    pub fn fine(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self { what: what.into(), outcome: Outcome::Fine, found: found.into(), remedy: String::new() }
    }

    /// It works, but something would help.
    pub fn weak(what: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { outcome: Outcome::Weak, remedy: remedy.into(), ..Self::fine(what, found) }
    }

    /// It does not work until something is done.
    pub fn broken(what: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { outcome: Outcome::Broken, remedy: remedy.into(), ..Self::fine(what, found) }
    }
}

/// The driver and each device.
#[must_use]
pub fn devices(inventory: &Inventory) -> Vec<Finding> {
    let mut findings = Vec::new();
    let cuda = inventory.cuda.as_ref().map_or_else(String::new, |cuda| format!(", CUDA {cuda}"));
    findings.push(match (&inventory.problem, &inventory.driver) {
        _ if inventory.simulated => {
            Finding::weak("GPUs", "SIMULATED", "nothing computes on them; take backend = \"nvml\" for real ones")
        }
        (Some(problem), _) => Finding::broken("GPU driver", problem.clone(), "see what `nvidia-smi` says"),
        (None, Some(driver)) => Finding::fine("GPU driver", format!("{driver}{cuda}")),
        (None, None) => Finding::fine("GPU driver", format!("unnamed{cuda}")),
    });
    // A GPU in slices is used by its slices.
    let usable: Vec<_> = inventory.devices.iter().filter(|d| !d.mig_parent).collect();
    if usable.is_empty() {
        findings.push(Finding::broken("GPUs", "none", "engines need one: no engine is run on the CPU"));
    }
    for d in usable {
        let place = d.mig.as_ref().map_or_else(|| d.index.to_string(), |m| format!("{}:{}", d.index, m.index));
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let found = format!("{}, {:.1} GiB, {:.1} GiB free", d.name, gib(d.vram_total), gib(d.vram_free));
        let what = format!("GPU {place}");
        findings.push(if !d.health.admits() {
            Finding::broken(what, format!("{found}, {}", d.health), d.verdict.advice())
        } else if d.verdict != Verdict::None {
            Finding::weak(what, found, d.verdict.advice())
        } else {
            Finding::fine(what, found)
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use pool_domain::DeviceSnapshot;
    use pool_domain::device::DeviceHealth;
    use pool_testkit::gpu;

    use super::*;

    fn device(index: u32) -> DeviceSnapshot {
        gpu(index, 80 << 30)
    }

    fn outcomes(inventory: &Inventory) -> Vec<(String, Outcome)> {
        devices(inventory).into_iter().map(|f| (f.what, f.outcome)).collect()
    }

    #[test]
    fn a_sick_device_is_told_with_what_to_do_and_the_others_are_fine() {
        let sick = DeviceSnapshot {
            health: DeviceHealth::Fenced("XID 79".into()),
            verdict: Verdict::ResetDevice,
            ..device(1)
        };
        let inventory =
            Inventory { driver: Some("580.1".into()), devices: vec![device(0), sick], ..Inventory::default() };
        let told = outcomes(&inventory);
        assert_eq!(
            told,
            [
                ("GPU driver".to_owned(), Outcome::Fine),
                ("GPU 0".to_owned(), Outcome::Fine),
                ("GPU 1".to_owned(), Outcome::Broken)
            ]
        );
        assert!(!devices(&inventory)[2].remedy.is_empty());
    }

    #[test]
    fn no_device_is_broken_and_simulated_ones_are_weak() {
        assert_eq!(outcomes(&Inventory::default())[1], ("GPUs".to_owned(), Outcome::Broken));
        let simulated = Inventory { simulated: true, devices: vec![device(0)], ..Inventory::default() };
        assert_eq!(outcomes(&simulated)[0].1, Outcome::Weak);
    }
}
