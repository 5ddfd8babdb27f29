//! What happens to the server meanwhile: a reload each second, with or without something new.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use crate::archives::PRIVATE;
use crate::authority::{Authority, Certified, replace};
use crate::server::{Reload, Server};
use crate::world::World;

/// How long the server is stopped.
const STOPPED: Duration = Duration::from_secs(5);

/// One of so many reads fails while the disk is ill.
const ONE_READ_IN: u64 = 10;

const ALLOW: &str = "[[rule]]\naction = \"allow\"\nidentity = \"uri:spiffe://stress/*\"\n";

/// The files that say who may come in, and who makes them.
pub(crate) struct Policy {
    folder: PathBuf,
    clients: Authority,
    /// The server's certificates: it begins with the first, and goes on with the second.
    servers: [Certified; 2],
}

/// What happens when, in parts of the whole time.
const EVENTS: [(f64, Event); 5] = [
    (0.15, Event::NewCertificate),
    (0.25, Event::BrokenRules),
    (0.40, Event::Revocation),
    (0.55, Event::Stop),
    (0.75, Event::Denial),
];

#[derive(Debug, Clone, Copy)]
enum Event {
    NewCertificate,
    BrokenRules,
    Revocation,
    Stop,
    Denial,
}

impl Policy {
    pub(crate) fn prepare(
        folder: PathBuf,
        clients: Authority,
        servers: [Certified; 2],
    ) -> Result<Self> {
        let policy = Self { folder, clients, servers };
        policy.show(0)?;
        policy.clients.write(&policy.path("clients.pem"))?;
        policy.revoke(&[])?;
        policy.rule(ALLOW)?;
        Ok(policy)
    }

    /// What the server is given.
    pub(crate) fn arguments(&self) -> Vec<String> {
        [
            ("--tls-cert", "server-cert.pem"),
            ("--tls-key", "server-key.pem"),
            ("--tls-client-ca", "clients.pem"),
            ("--tls-client-crl", "crl.pem"),
            ("--rules", "rules.toml"),
        ]
        .into_iter()
        .flat_map(|(option, file)| [option.to_owned(), self.path(file).display().to_string()])
        .collect()
    }

    pub(crate) fn first_certificate(&self) -> &Certified {
        &self.servers[0]
    }

    fn show(&self, which: usize) -> Result<()> {
        self.servers[which].write(&self.path("server-cert.pem"), &self.path("server-key.pem"))
    }

    fn revoke(&self, revoked: &[&Certified]) -> Result<()> {
        self.clients.revoke(revoked, &self.path("crl.pem"))
    }

    fn rule(&self, rules: &str) -> Result<()> {
        replace(&self.path("rules.toml"), rules)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }
}

/// Lets everything happen, and says when that long has passed.
pub(crate) async fn direct(
    world: &Arc<World>,
    server: &Server,
    policy: &Policy,
    duration: Duration,
) -> Result<()> {
    let start = Instant::now();
    let mut events = EVENTS.into_iter().peekable();
    let mut seconds = 0_u64;
    while start.elapsed() < duration {
        match events.next_if(|(part, _)| start.elapsed() >= duration.mul_f64(*part)) {
            Some((_, event)) => {
                eprintln!("{:>4} s: {event:?}", start.elapsed().as_secs());
                event.happen(world, server, policy).await?;
                world.ledger.count("events: of those that change something");
            }
            None => drop(reload(world, server, true).await?),
        }
        if seconds.is_multiple_of(2) {
            world.archives.turning.turn()?;
            world.ledger.count("events: an archive replaced");
        }
        // Well to begin with, and at the end, so that all can be read then.
        let ends_soon = start.elapsed() + Duration::from_secs(5) > duration;
        world.faults.set(if seconds % 6 < 3 || ends_soon { 0 } else { ONE_READ_IN })?;
        seconds += 1;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    world.ledger.require(events.next().is_none(), "not everything has happened");
    Ok(())
}

impl Event {
    async fn happen(self, world: &Arc<World>, server: &Server, policy: &Policy) -> Result<()> {
        match self {
            Self::NewCertificate => {
                let [old, new] = &policy.servers;
                world.shown.set(vec![old.certificate.clone(), new.certificate.clone()]);
                policy.show(1)?;
                reload(world, server, true).await?;
                world.shown.set(vec![new.certificate.clone()]);
            }
            // Nothing of it may be taken over, though the revocation list is good, and revokes
            // somebody who reads.
            Self::BrokenRules => {
                policy.rule("[[rule]]\naction = \"allow\"\nidentity = ")?;
                policy.revoke(&[&world.people.spared])?;
                for _ in 0..3 {
                    reload(world, server, false).await?;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                policy.revoke(&[])?;
                policy.rule(ALLOW)?;
                reload(world, server, true).await?;
            }
            Self::Revocation => {
                world.revocation.begin();
                policy.revoke(&[&world.people.revoked])?;
                if let Reload::Done(at) = reload(world, server, true).await? {
                    world.revocation.end(at);
                }
            }
            Self::Denial => {
                world.denial.begin();
                let deny = format!(
                    "[[rule]]\naction = \"deny\"\nidentity = \"uri:spiffe://stress/denied\"\n\
                     export = \"{PRIVATE}\"\n\n{ALLOW}"
                );
                policy.rule(&deny)?;
                if let Reload::Done(at) = reload(world, server, true).await? {
                    world.denial.end(at);
                }
            }
            Self::Stop => {
                world.stop.begin();
                server.signal(Signal::STOP)?;
                tokio::time::sleep(STOPPED).await;
                server.signal(Signal::CONT)?;
                // It has something to catch up with.
                tokio::time::sleep(Duration::from_secs(1)).await;
                world.stop.end(Instant::now());
            }
        }
        Ok(())
    }
}

/// A reload that has to succeed, or to be refused.
async fn reload(world: &World, server: &Server, succeeds: bool) -> Result<Reload> {
    let start = Instant::now();
    let reloaded = server.reload().await?;
    world.ledger.took("events: longest reload", start.elapsed());
    world.ledger.count(match reloaded {
        Reload::Done(_) => "events: reloads",
        Reload::Refused => "events: reloads refused, as they had to be",
    });
    if succeeds != (reloaded != Reload::Refused) {
        world.ledger.violation(format_args!("a reload ended otherwise: {reloaded:?}"));
    }
    Ok(reloaded)
}
