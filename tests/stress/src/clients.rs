//! Honest clients: those that read all the time, and those that come and go.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nbd_server::budget::RESERVE;
use nbd_server::client::ClientError;
use nbd_server::wire::option::Rep;
use nbd_server::wire::reply::ErrorCode;
use rustls::ClientConfig;

use crate::random::Random;
use crate::session::{Fault, Session, server_certificate};
use crate::world::{Turn, World};

/// Within a second of the line "reloaded", as is promised, and some time for this side to
/// notice: it shares the machine, and has to read what had been sent.
const GONE_WITHIN: Duration = Duration::from_secs(3);

/// How long it may take to come in, on a machine that has much else to do.
const IN_WITHIN: Duration = Duration::from_secs(10);

/// What becomes of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Steady,
    OnFaultyDisk,
    /// Reads an archive that is replaced meanwhile.
    Turning,
    ToBeRevoked,
    ToBeDenied,
}

impl Role {
    fn of(number: u32) -> Self {
        match number % 25 {
            0 => Self::ToBeRevoked,
            1 => Self::ToBeDenied,
            2 => Self::Turning,
            3..8 => Self::OnFaultyDisk,
            _ => Self::Steady,
        }
    }

    fn config(self, world: &World, number: u32) -> &Arc<ClientConfig> {
        let people = &world.people;
        match self {
            Self::ToBeRevoked => &people.to_be_revoked,
            Self::ToBeDenied => &people.to_be_denied,
            _ => &people.readers[number as usize % people.readers.len()],
        }
    }

    /// By what it loses its right to stay.
    fn dismissal(self, world: &World) -> Option<&Turn> {
        match self {
            Self::ToBeRevoked => Some(&world.revocation),
            Self::ToBeDenied => Some(&world.denial),
            _ => None,
        }
    }
}

/// A client that reads from the beginning to the end, or until it may not stay.
pub(crate) async fn reader(world: Arc<World>, number: u32) {
    let role = Role::of(number);
    let config = role.config(&world, number);
    let from = Ipv4Addr::new(127, 1, (number / 200) as u8, (1 + number % 200) as u8);
    let mut random = Random::new(number.into());
    let structured = number.is_multiple_of(2);

    let begun = {
        let _place = world.gate.acquire().await;
        let start = Instant::now();
        let begun = begin(&world, role, from, config, structured, &mut random).await;
        world.ledger.took("clients: longest way in at the start", start.elapsed());
        begun
    };
    let mut session = match begun {
        Ok(session) => session,
        Err(error) => {
            world
                .ledger
                .violation(format_args!("client {number}, {role:?}, wasn't let in: {error}"));
            return;
        }
    };
    world.readers.fetch_add(1, Ordering::Relaxed);
    let dismissal = role.dismissal(&world);
    let ended = read_on(&world, &mut session, &mut random, dismissal).await;
    match (ended, dismissal) {
        (Ok(()), None) => {
            world.ledger.count("clients: stayed to the end");
            session.leave().await;
        }
        (Ok(()), Some(_)) => {
            world.ledger.violation(format_args!("client {number}, {role:?}, could stay"));
        }
        (Err(Fault::Gone(_)), Some(dismissal)) if dismissal.has_begun() => {
            dismissed(&world, role, from, config, dismissal).await;
        }
        (Err(fault), _) => {
            let name = &session.export().name;
            world.ledger.violation(format_args!("client {number}, {role:?}, {name}: {fault}"));
        }
    }
}

async fn begin(
    world: &World,
    role: Role,
    from: Ipv4Addr,
    config: &Arc<ClientConfig>,
    structured: bool,
    random: &mut Random,
) -> Result<Session, ClientError> {
    match role {
        Role::Turning => return world.turning(from, config, structured).await,
        Role::ToBeDenied => {
            return world.session(from, config, &world.archives.private, structured).await;
        }
        Role::OnFaultyDisk | Role::Steady | Role::ToBeRevoked => {}
    }
    let exports = world.archives.steady_on(role == Role::OnFaultyDisk);
    let export = exports[random.below(exports.len() as u64) as usize];
    world.session(from, config, export, structured).await
}

/// Reads until the end. Those who may not stay are closed meanwhile.
async fn read_on(
    world: &World,
    session: &mut Session,
    random: &mut Random,
    dismissal: Option<&Turn>,
) -> Result<(), Fault> {
    let mut failed_before = false;
    while !world.is_over() {
        if let Some(done) = dismissal.and_then(Turn::done)
            && done.elapsed() > GONE_WITHIN
        {
            return Ok(());
        }
        read_some(world, session, random, &mut failed_before).await?;
        random.pause(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// Some reads at once, each of which has to bring the right bytes.
async fn read_some(
    world: &World,
    session: &mut Session,
    random: &mut Random,
    failed_before: &mut bool,
) -> Result<(), Fault> {
    let mut total = 0;
    for _ in 0..=random.below(4) {
        let length = random.up_to_bits(18).min(session.size());
        total += length;
        session.ask(random.below(session.size() - length + 1), length).await?;
    }
    // What is larger than what each connection has for itself waits for what all share, which
    // those who don't read what they asked for keep as long as --stall-timeout says.
    let is_small = total <= u64::from(RESERVE);
    while session.waiting() > 0 {
        let answer = session.answer().await?;
        let took = answer.asked_at.elapsed();
        world.ledger.took(
            match (world.stop.touches(answer.asked_at), is_small) {
                (true, _) => "reads: longest, while stopped",
                (false, true) => "reads: longest, within the connection's reserve",
                (false, false) => "reads: longest, beyond the connection's reserve",
            },
            took,
        );
        let export = session.export();
        match answer.error {
            None => {
                world.ledger.count("reads: compared, and right");
                world.ledger.add("reads: bytes compared", answer.length);
                if std::mem::take(failed_before) {
                    world.ledger.count("reads: right after one that failed");
                }
            }
            Some(ErrorCode::IO)
                if export.is_faulty && world.faults.may_have_failed(answer.asked_at) =>
            {
                world.ledger.count("reads: failed, as the disk did");
                *failed_before = true;
            }
            Some(error) => {
                world.ledger.violation(format_args!("a read of {} failed: {error}", export.name));
            }
        }
    }
    Ok(())
}

/// A client that had to go tries to come back, which it may not.
async fn dismissed(
    world: &World,
    role: Role,
    from: Ipv4Addr,
    config: &Arc<ClientConfig>,
    dismissal: &Turn,
) {
    let gone = Instant::now();
    world.ledger.count(match role {
        Role::ToBeRevoked => "clients: revoked, and dropped",
        _ => "clients: denied an export, and dropped",
    });
    while dismissal.done().is_none() && !world.is_over() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    if let Some(done) = dismissal.done() {
        let after = gone.saturating_duration_since(done);
        world.ledger.took("clients: longest from \"reloaded\" until dropped", after);
    }
    let export = match role {
        Role::ToBeDenied => &world.archives.private,
        _ => &world.archives.steady[0],
    };
    while world.rest(Duration::from_secs(1)).await.is_continue() {
        match world.choose(from, config, &export.name, false).await {
            Ok(_) => world.ledger.violation(format_args!("{role:?} came back")),
            Err(ClientError::Refused { reply: Rep::ERR_UNKNOWN, .. })
                if role == Role::ToBeDenied =>
            {
                world.ledger.count("clients: tried in vain to come back");
                // All others are still open to it.
                let other = world.session(from, config, &world.archives.steady[0], true).await;
                match other {
                    Ok(session) => session.leave().await,
                    Err(error) => world.ledger.violation(format_args!("{role:?}, other: {error}")),
                }
            }
            Err(ClientError::Io(_)) if role == Role::ToBeRevoked => {
                world.ledger.count("clients: tried in vain to come back");
            }
            Err(error) => world.ledger.violation(format_args!("{role:?}: {error}")),
        }
    }
}

/// Clients that come, read a little, and leave, one after the other: they have to come in
/// promptly, whoever else is at the door, and to find the certificate and the archive that
/// are there just then.
pub(crate) async fn newcomers(world: Arc<World>, number: u8) {
    let mut random = Random::new(1000 + u64::from(number));
    let mut visit = 0;
    while world.rest(Duration::from_millis(random.below(400))).await.is_continue() {
        visit += 1;
        let from = Ipv4Addr::new(127, 2, number, (1 + visit % 200) as u8);
        let config = &world.people.readers[random.below(8) as usize];
        if let Err(why) = visit_once(&world, from, config, visit, &mut random).await {
            world.ledger.violation(format_args!("a newcomer, visit {visit}: {why}"));
        }
    }
}

async fn visit_once(
    world: &World,
    from: Ipv4Addr,
    config: &Arc<ClientConfig>,
    visit: u32,
    random: &mut Random,
) -> Result<(), String> {
    let structured = visit.is_multiple_of(2);
    if visit.is_multiple_of(8) {
        let mut shown = world.shown.now();
        let stream = world.secure(from, config).await.map_err(|error| error.to_string())?;
        shown.extend(world.shown.now());
        let certificate = server_certificate(&stream).ok_or("no certificate")?;
        if !shown.contains(certificate) {
            return Err("the server shows another certificate".into());
        }
        world.ledger.count("newcomers: looked at the server's certificate");
        return Ok(());
    }
    let start = Instant::now();
    let begun = match visit % 3 {
        0 => world.turning(from, config, structured).await,
        _ => {
            let exports = &world.archives.steady;
            let export = &exports[random.below(exports.len() as u64) as usize];
            world.session(from, config, export, structured).await
        }
    };
    let mut session = begun.map_err(|error| format!("it wasn't let in: {error}"))?;
    let took = start.elapsed();
    if world.stop.touches(start) {
        world.ledger.took("newcomers: longest way in, while stopped", took);
    } else {
        world.ledger.took("newcomers: longest way in", took);
        if took > IN_WITHIN {
            return Err(format!("it took {took:?} to come in"));
        }
    }
    let mut failed_before = false;
    for _ in 0..=random.below(4) {
        read_some(world, &mut session, random, &mut failed_before)
            .await
            .map_err(|fault| format!("{}: {fault}", session.export().name))?;
    }
    session.leave().await;
    Ok(())
}
