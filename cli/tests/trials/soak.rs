//! The soak: for minutes or hours several domains over one state directory, whatever can be done with them in any order, and
//! kills at any moment of the command, the hypervisors, the servers and the readers. A model says what each disk, snapshot and
//! backup must hold; what does not hold is told with the seed and with all that was done to the domain.
//!
//! `DISKSNAP_SOAK_SECONDS` says how long (`./x soak` sets it), `DISKSNAP_SOAK_SEED` which numbers are drawn. The same seed draws the
//! same deeds for each worker; which of them meet is the machine's.

mod deeds;
mod life;
mod run;
mod tale;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use disksnap_test_support::pattern::Random;
use disksnap_test_support::require;

use self::deeds::Doing;
use self::life::{Life, Told, none};
use self::tale::Tale;
use crate::invariants;
use crate::scene::{Kind, Scene};
use crate::site::{Site, arg};
use crate::table::note;

/// As long as nothing else is said.
const SECONDS: u64 = 180;
/// The domains.
const DOMAINS: [Kind; 8] = [
    Kind::Fleece,
    Kind::External,
    Kind::Btrfs,
    Kind::Reflink,
    Kind::ExternalOff,
    Kind::Fleece,
    Kind::External,
    Kind::Btrfs,
];
/// How many of them are worked upon at a time.
const WORKERS: u64 = 3;
/// After what time everything is looked at together.
const TOGETHER: Duration = Duration::from_secs(50);

static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Since it began.
fn elapsed() -> Duration {
    BEGAN.elapsed()
}

struct Soak {
    site: Arc<Site>,
    /// Taken out where something went wrong with it.
    lives: Vec<Mutex<Option<Life>>>,
    tale: Tale,
    /// Shared by those who work on one domain; alone whoever looks at all of them.
    quiet: RwLock<()>,
    end: Instant,
    seed: u64,
}

#[test]
#[ignore = "minutes: run by ./x soak"]
fn whatever_is_done_and_killed_for_as_long_as_one_likes() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = number("DISKSNAP_SOAK_SEED").unwrap_or(u64::from(since_epoch.subsec_nanos()));
    let length = Duration::from_secs(number("DISKSNAP_SOAK_SECONDS").unwrap_or(SECONDS));
    note(&format!("a soak of {} s with the seed {seed}", length.as_secs()));
    let soak = Soak::new(seed, length);
    soak.run();
    note(&format!(
        "seed {seed}, {} s\n{}",
        elapsed().as_secs(),
        soak.tale.text()
    ));
    assert_eq!(soak.tale.failures(), 0, "the seed was {seed}");
}

#[expect(
    clippy::redundant_closure_for_method_calls,
    reason = "a method of a type that borrows is not general enough"
)]
impl Soak {
    fn new(seed: u64, length: Duration) -> Self {
        let (site, tale) = (Arc::new(Site::new()), Tale::default());
        LazyLock::force(&BEGAN);
        let mut lives = Vec::new();
        for (number, kind) in DOMAINS.into_iter().enumerate() {
            if let Some(lacking) = kind.needs().and_then(require::lacking) {
                note(&format!("SKIPPED {}: {lacking}", kind.name()));
                continue;
            }
            let mut life = Life::new(number, Scene::new(kind, &site), arg(&site.path("repo")));
            // Only who is worked upon has the processor.
            life.rest();
            lives.push(Mutex::new(Some(life)));
        }
        Self {
            site,
            lives,
            tale,
            quiet: RwLock::new(()),
            end: Instant::now() + length,
            seed,
        }
    }

    fn run(&self) {
        std::thread::scope(|scope| {
            for worker in 0..WORKERS {
                scope.spawn(move || self.work(worker));
            }
            scope.spawn(|| self.look_together());
        });
        let mut random = Random::new(self.seed);
        for (n, life) in self.lives.iter().enumerate() {
            self.on(n, life, &mut random, |doing| doing.clear());
        }
        if self.tale.failures() == 0 {
            self.together(true);
        }
    }

    fn is_over(&self) -> bool {
        // Where much has failed the rest tells nothing more.
        Instant::now() >= self.end || self.tale.failures() >= 4
    }

    fn work(&self, worker: u64) {
        let mut random = Random::new(self.seed ^ (worker << 32));
        while !self.is_over() {
            let _shared = self.quiet.read().unwrap_or_else(PoisonError::into_inner);
            let n = usize::try_from(random.below(self.lives.len() as u64)).unwrap();
            self.on(n, &self.lives[n], &mut random, |doing| doing.round());
        }
    }

    /// Something on a domain that nobody else works upon. One that fails is left as it is, and not touched again.
    fn on(
        &self,
        n: usize,
        life: &Mutex<Option<Life>>,
        random: &mut Random,
        act: impl FnOnce(&mut Doing<'_>) -> Told,
    ) {
        let Ok(mut held) = life.try_lock() else {
            // Another worker's.
            std::thread::sleep(Duration::from_millis(5));
            return;
        };
        let Some(life) = held.as_mut() else {
            std::thread::sleep(Duration::from_millis(5));
            return;
        };
        let mut doing = Doing {
            life,
            random,
            tale: &self.tale,
        };
        let done = catch_unwind(AssertUnwindSafe(|| act(&mut doing)));
        let why = match done {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(panic) => match panic.downcast_ref::<String>() {
                Some(text) => text.clone(),
                None => "a panic".to_owned(),
            },
        };
        if let Some(failed) = held.take() {
            let told = format!(
                "domain {n} ({}), seed {}: {why}\n  {}",
                failed.scene.kind.name(),
                self.seed,
                failed.log.join("\n  ")
            );
            note(&format!("FAILED {told}"));
            self.tale.failed(told);
            if std::env::var_os("DISKSNAP_SOAK_KEEP").is_some() {
                note("it is kept for whoever looks: end this process when done");
                loop {
                    std::thread::park();
                }
            }
        }
    }

    fn look_together(&self) {
        let mut next = Instant::now() + TOGETHER;
        while !self.is_over() {
            std::thread::sleep(Duration::from_millis(100));
            if Instant::now() >= next && self.tale.failures() == 0 {
                self.together(false);
                next = Instant::now() + TOGETHER;
                note(&format!("{} s: {}", elapsed().as_secs(), self.brief()));
            }
        }
    }

    fn brief(&self) -> String {
        let text = self.tale.text();
        text.lines()
            .find(|line| line.starts_with("all "))
            .unwrap_or_default()
            .to_owned()
    }

    /// All that is in the state directory and belongs to nobody. Nothing at all is to be there in the end.
    fn together(&self, end: bool) {
        let _alone = self.quiet.write().unwrap_or_else(PoisonError::into_inner);
        self.tale.checked("all domains together");
        let mut random = Random::new(self.seed);
        for (n, life) in self.lives.iter().enumerate() {
            self.on(n, life, &mut random, |doing| doing.tidy());
        }
        let lives: Vec<_> = self
            .lives
            .iter()
            .map(|life| life.lock().unwrap_or_else(PoisonError::into_inner))
            .collect();
        let scenes: Vec<&Scene> = lives
            .iter()
            .filter_map(|life| Some(&life.as_ref()?.scene))
            .collect();
        if scenes.len() < self.lives.len() {
            return;
        }
        let looked = catch_unwind(AssertUnwindSafe(|| {
            none(invariants::eventually(|| invariants::state(&self.site, &scenes)))?;
            if !end {
                return Ok(());
            }
            let (images, run) = (self.site.images(), crate::site::list(&self.site.run_dir()));
            if !images.is_empty() || !run.is_empty() {
                return Err(format!("all was given up, and there are {images:?} {run:?}"));
            }
            if self.site.path("repo").exists() {
                none(invariants::eventually(|| {
                    scenes
                        .iter()
                        .take(1)
                        .flat_map(|scene| invariants::repository(scene, &arg(&self.site.path("repo"))))
                        .collect()
                }))?;
            }
            Ok(())
        }));
        let wrong = match looked {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(_) => "a command that looks failed".to_owned(),
        };
        let logs: Vec<String> = lives
            .iter()
            .filter_map(|life| life.as_ref())
            .map(|life| {
                format!(
                    "domain {} ({}):\n  {}",
                    life.number,
                    life.scene.stem,
                    last(&life.log).join("\n  ")
                )
            })
            .collect();
        let told = format!("all together: {wrong}\n{}", logs.join("\n"));
        note(&format!("FAILED {told}"));
        self.tale.failed(told);
    }
}

/// What was done last.
fn last(log: &[String]) -> &[String] {
    &log[log.len().saturating_sub(40)..]
}
