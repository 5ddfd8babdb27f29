use std::cell::Cell;
use std::future::pending;

use super::*;

/// Creates a service, and the socket on which its manager receives.
fn service(watchdog: Option<Duration>) -> (Notifier, UnixDatagram) {
    let (ours, managers) = std::os::unix::net::UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    managers.set_nonblocking(true).unwrap();
    let manager = ManagerSocket { socket: Some(ours), watchdog };
    (Notifier::new(manager).unwrap(), UnixDatagram::from_std(managers).unwrap())
}

fn try_receive(manager: &UnixDatagram) -> Option<String> {
    let mut message = [0; 8192];
    let length = manager.try_recv(&mut message).ok()?;
    Some(String::from_utf8(message[..length].to_vec()).unwrap())
}

async fn receive(manager: &UnixDatagram) -> String {
    manager.readable().await.unwrap();
    try_receive(manager).unwrap()
}

#[test]
fn the_watchdog_applies_only_to_this_process() {
    let me = std::process::id().to_string();
    let of = |time: &str, process: Option<&str>| {
        watchdog_interval(Some(time.to_owned()), process.map(str::to_owned))
    };
    assert_eq!(of("2000000", None), Some(Duration::from_secs(2)));
    assert_eq!(of("2000000", Some(&me)), Some(Duration::from_secs(2)));
    assert_eq!(of("2000000", Some("1")), None);
    for junk in ["", "0", "-1", "2s"] {
        assert_eq!(of(junk, None), None, "{junk}");
    }
    assert_eq!(watchdog_interval(None, None), None);
}

#[test]
fn manager_addresses_are_parsed() {
    for nowhere in ["relative", "vsock:2:1", "@nobody here", "/no/such/socket"] {
        assert!(connect(OsStr::new(nowhere)).is_err(), "{nowhere}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let by_path = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let name = format!("hexz-nbd-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
    let by_name = std::os::unix::net::UnixDatagram::bind_addr(&address).unwrap();
    let name = format!("@{name}");
    for (address, manager) in [(path.as_os_str(), by_path), (OsStr::new(&name), by_name)] {
        connect(address).unwrap().send(b"x").unwrap();
        assert_eq!(manager.recv(&mut [0; 8]).unwrap(), 1, "{address:?}");
    }
}

/// With a manager, these futures don't complete.
#[tokio::test(start_paused = true)]
async fn without_a_manager_nothing_is_sent() {
    let service = Notifier::new(ManagerSocket::default()).unwrap();
    service.ready("x".to_owned(), String::new()).await;
    let probes = Cell::new(0);
    let probe = || async {
        probes.set(1);
        Ok(())
    };
    let all = async { tokio::join!(service.run_status(|| 1), service.run_watchdog(probe)) };
    assert!(timeout(Duration::from_secs(60), all).await.is_ok());
    assert_eq!(probes.get(), 0);
}

#[tokio::test]
async fn failed_and_successful_reloads_are_reported() {
    let (service, manager) = service(None);
    service.ready("a.hxz".to_owned(), "to all".to_owned()).await;
    assert_eq!(receive(&manager).await, "READY=1\nSTATUS=0 reading; serving a.hxz to all\n");
    service.reloading().await;
    let message = receive(&manager).await;
    let clock = message.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().trim_end();
    assert!(clock.parse::<u64>().unwrap() > 0);
    service.reloaded(None).await;
    let failed = "READY=1\nSTATUS=0 reading; reload failed, see the log; serving a.hxz to all\n";
    assert_eq!(receive(&manager).await, failed);
    service.set_exports("b.hxz".to_owned());
    service.reloaded(Some("to some".to_owned())).await;
    assert_eq!(receive(&manager).await, "READY=1\nSTATUS=0 reading; serving b.hxz to some\n");
    service.stopping().await;
    service.stopping().await;
    assert!(receive(&manager).await.starts_with("STOPPING=1\n"));
    assert_eq!(try_receive(&manager), None);
}

/// Paused time advances as soon as all tasks wait.
#[tokio::test(start_paused = true)]
async fn the_status_is_sent_at_most_once_a_second() {
    let (service, manager) = service(None);
    let count = Cell::new(0);
    let counting = async {
        for number in 1..=100 {
            tokio::time::sleep(Duration::from_millis(70)).await;
            count.set(number);
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    };
    tokio::select! {
        () = service.run_status(|| count.get()) => panic!("it ended"),
        () = counting => {}
    }
    let lines: Vec<String> = std::iter::from_fn(|| try_receive(&manager)).collect();
    // Seven seconds of changes, and none afterwards.
    assert!((7..=8).contains(&lines.len()), "{lines:?}");
    assert_eq!(lines.last().unwrap(), "STATUS=100 reading; serving  \n");
}

#[tokio::test(start_paused = true)]
async fn the_watchdog_is_notified_twice_per_interval() {
    let (service, manager) = service(Some(Duration::from_secs(10)));
    let started = tokio::time::Instant::now();
    let works = || async { Ok(()) };
    let alive = timeout(Duration::from_secs(101), service.run_watchdog(works)).await;
    assert!(alive.is_err());
    let count = std::iter::from_fn(|| try_receive(&manager)).inspect(|message| {
        assert_eq!(message, "WATCHDOG=1\n");
    });
    assert_eq!(count.count(), 21);
    assert!(started.elapsed() >= Duration::from_secs(100));
}

/// Anything that hangs makes the probe hang.
#[tokio::test(start_paused = true)]
async fn the_watchdog_is_not_notified_while_the_probe_hangs() {
    let (service, manager) = service(Some(Duration::from_secs(10)));
    let stuck = service.run_watchdog(pending::<Result<(), &str>>);
    assert!(timeout(Duration::from_secs(100), stuck).await.is_err());
    let failed = service.run_watchdog(|| async { Err("a fault") });
    assert!(timeout(Duration::from_secs(100), failed).await.is_err());
    assert_eq!(try_receive(&manager), None);
    // It recovers if the probe succeeds again.
    let rounds = Cell::new(0);
    let later = service.run_watchdog(|| {
        rounds.set(rounds.get() + 1);
        let works = rounds.get() > 3;
        async move { if works { Ok(()) } else { pending().await } }
    });
    assert!(timeout(Duration::from_secs(31), later).await.is_err());
    assert!(try_receive(&manager).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_startup_that_makes_progress_extends_its_timeout() {
    let (service, manager) = service(None);
    let work = tokio::time::sleep(Duration::from_secs(65));
    let begun = tokio::time::Instant::now();
    service.run_startup(|| begun.elapsed().as_secs().min(35), work).await;
    let messages: Vec<String> = std::iter::from_fn(|| try_receive(&manager)).collect();
    // There was progress for 35 seconds.
    assert_eq!(messages, ["EXTEND_TIMEOUT_USEC=60000000\n"; 4]);
}

/// The manager doesn't read, so the socket's buffer fills up.
#[tokio::test(start_paused = true)]
async fn an_unresponsive_manager_does_not_block() {
    let (service, _manager) = service(None);
    let started = tokio::time::Instant::now();
    let long = "x".repeat(1000);
    while started.elapsed() < SEND_TIMEOUT {
        service.ready(long.clone(), String::new()).await;
    }
    // Only one message had to wait.
    assert!(started.elapsed() < SEND_TIMEOUT * 2, "{:?}", started.elapsed());
}
