//! `hexz-nbd top`, in a real terminal and in a pipe, against the real server and against some
//! that mean no good.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use super::monitor_of;
use crate::clients::run;
use crate::support::client::Request;
use crate::support::server::{Server, run as run_binary};
use crate::support::{archive, wait_until};

/// A terminal with a shell in it, made by tmux. It goes when this is dropped.
struct Terminal {
    folder: TempDir,
}

impl Terminal {
    fn new() -> Self {
        let terminal = Self { folder: tempfile::tempdir().unwrap() };
        terminal.tmux(&["new-session", "-d", "-x", "100", "-y", "24", "exec sh"]);
        terminal
    }

    fn tmux(&self, args: &[&str]) -> String {
        let socket = self.folder.path().join("tmux");
        let ours = ["-u", "-S", socket.to_str().unwrap(), "-f", "/dev/null"];
        run("tmux", &[&ours[..], args].concat()).ok()
    }

    /// Keys by their names; others as they are.
    fn press(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    /// Starts the program, and waits for its end in the terminal.
    fn start(&self, arguments: &str) {
        let pid = self.folder.path().join("pid");
        let command = format!("echo $$ >{}; exec {BINARY} {arguments}", pid.display());
        self.press(&[&format!("clear; sh -c '{command}'; echo ended with $?"), "Enter"]);
    }

    /// Sends the program that was started last a signal.
    fn signal(&self, name: &str) {
        let pid = std::fs::read_to_string(self.folder.path().join("pid")).unwrap();
        run("sh", &["-c", &format!("kill -{name} {pid}")]).ok();
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn wait_for(&self, text: &str) -> String {
        let mut screen = String::new();
        wait_until(&format!("the terminal shows {text:?}"), || {
            screen = self.screen();
            screen.contains(text)
        });
        screen
    }

    /// Whether it is as a shell wants it: with a cursor, not the other screen, lines and echo.
    fn is_given_back(&self) -> bool {
        let state = self.tmux(&["display", "-p", "#{cursor_flag} #{alternate_on} #{wrap_flag}"]);
        self.press(&[
            "clear; stty -a | tr ' ;' '\\n\\n' | grep -x '.*icanon\\|.*echo' | xargs echo modes",
            "Enter",
        ]);
        let modes = self.wait_for("modes ");
        state.trim() == "1 0 1" && modes.contains("modes icanon echo\n")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}

const BINARY: &str = env!("CARGO_BIN_EXE_hexz-nbd");

/// The page that lists the labels.
pub(super) const DOCUMENTED: &str = include_str!("../../../docs/troubleshooting.md");

fn server() -> Server {
    Server::builder().archive("base-zstd.hxz").args(["--monitor", "127.0.0.1:0"]).start()
}

#[test]
fn it_shows_the_server_until_a_key_is_pressed() {
    let server = server();
    let mut client = server.go("base-zstd.hxz");
    let terminal = Terminal::new();
    terminal.start(&format!("top {} --interval 200ms", monitor_of(&server)));
    terminal.wait_for("EXPORTS 1");
    // Until it has seen something move.
    let mut screen = String::new();
    wait_until("a rate is shown", || {
        client.send_request(Request::read(1, 0, 65_536));
        assert_eq!(client.simple_reply().error, 0);
        client.receive(65_536);
        screen = terminal.screen();
        let rate = |line: &str| line.starts_with("base-zstd.hxz") && line.contains("iB/s");
        screen.lines().any(rate)
    });
    assert!(screen.contains("CONNECTIONS 1\n"), "{screen}");
    assert!(screen.contains("no certificate"), "{screen}");
    assert!(screen.lines().nth(1).unwrap().contains("1 reading, 0 negotiating"), "{screen}");

    terminal.press(&["s"]);
    terminal.wait_for("s sort: requests");
    terminal.press(&["e"]);
    wait_until("only exports are shown", || {
        let screen = terminal.screen();
        screen.contains("EXPORTS") && !screen.contains("CONNECTIONS")
    });
    terminal.press(&["e"]);
    wait_until("only connections are shown", || !terminal.screen().contains("EXPORTS"));
    terminal.tmux(&["resize-window", "-x", "50", "-y", "12"]);
    wait_until("the foot is on the last line", || {
        let screen = terminal.screen();
        screen.lines().count() == 12 && screen.lines().last().unwrap().starts_with("q quit")
    });
    terminal.press(&["q"]);
    terminal.wait_for("ended with 0");
    assert!(terminal.is_given_back());
}

#[test]
fn a_signal_or_a_lost_server_leaves_no_mess() {
    let mut server = server();
    let terminal = Terminal::new();
    terminal.start(&format!("top {} --interval 200ms", monitor_of(&server)));
    terminal.wait_for("EXPORTS 1");
    server.terminate();
    let screen = terminal.wait_for("[connect_failed]");
    assert!(screen.contains("EXPORTS 1"), "{screen}");

    terminal.signal("TERM");
    terminal.wait_for("ended with 143");
    assert!(terminal.is_given_back());
    terminal.start("top 1 --interval 200ms");
    terminal.wait_for("[connect_failed]");
    terminal.press(&["C-c"]);
    terminal.wait_for("ended with 0");
    assert!(terminal.is_given_back());
}

#[test]
fn a_pipe_gets_plain_text() {
    let server = server();
    let _client = server.go("base-zstd.hxz");
    let ended = run_binary(["top", &monitor_of(&server), "--interval", "200ms"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert!(ended.stdout.starts_with(&format!("hexz-nbd {}", env!("CARGO_PKG_VERSION"))));
    for line in ["base-zstd.hxz  8.0 MiB        1  0 B/s", "no certificate  127.0.0.1"] {
        assert!(ended.stdout.contains(line), "{}", ended.stdout);
    }
    assert!(ended.stdout.chars().all(|c| c == '\n' || !c.is_control()), "{:?}", ended.stdout);
}

#[test]
fn unix_sockets_can_be_asked() {
    let folder = tempfile::tempdir().unwrap();
    let place = format!("unix:{}", folder.path().join("monitor").display());
    let _server =
        Server::start([archive("base-zstd.hxz"), "--monitor".into(), PathBuf::from(&place)]);
    let ended = run_binary(["top", "--once", &place, "--interval", "200ms"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("EXPORTS 1\n"), "{}", ended.stdout);
}

/// Answers each connection with that, as long as the test runs.
pub(super) fn answering(answer: impl Fn(&mut dyn Write) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            // The head of the request comes in one piece; what is wrong shows in the test.
            let _ = stream.read(&mut [0; 4096]);
            answer(&mut stream);
        }
    });
    address
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn whatever_answers_can_not_disturb_it() {
    let once = |place: &str| run_binary(["top", "--once", place, "--interval", "200ms"]);
    let refused = |answer: String, reason: &str| {
        let place = answering(move |stream| {
            let _ = stream.write_all(answer.as_bytes());
        });
        let ended = once(&place);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{reason}");
        assert!(ended.stderr.contains(&format!("reason=\"{reason}\"")), "{}", ended.stderr);
        assert!(DOCUMENTED.contains(&format!("`{reason}`")), "{reason} isn't documented");
    };
    refused(ok("[1, 2"), "not_a_status");
    refused(ok("[]"), "not_a_status");
    refused("SSH-2.0-OpenSSH_9.2\r\n".to_owned(), "not_http");
    refused("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned(), "http_status");
    refused("HTTP/1.1 421 No\r\nContent-Length: 0\r\n\r\n".to_owned(), "unknown_host");
    refused("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{".to_owned(), "truncated");
    refused("HTTP/1.1 200 OK\r\n\r\n".to_owned() + &" ".repeat(9 << 20), "too_long");
    let silent = answering(|_| thread::sleep(Duration::from_secs(7)));
    assert!(once(&silent).stderr.contains("reason=\"timeout\""));

    // What others call themselves is written out, not obeyed.
    let evil = "\u{1b}]0;owned\u{7}\u{1b}[2J\u{9b}31m\r\n\u{202e}";
    let status = json!({
        "format": 1, "version": evil, "ready": false, "unready": evil, "listen": [evil],
        "connections": [{ "id": 1, "peer": evil, "via": evil, "identity": evil, "export": evil,
            "state": evil, "tls": evil }],
        "exports": [{ "name": evil }], "verification_failures": { evil: 1 },
        "reloads": { "failed": 1, "last_error": evil },
        "recent_errors": [{ "at": 1e308, "message": evil }],
    });
    let place = answering(move |stream| {
        let _ = stream.write_all(ok(&status.to_string()).as_bytes());
    });
    let ended = once(&place);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains(r"\u{1b}]0;owned\u{7}"), "{}", ended.stdout);
    let clean = |c: char| c == '\n' || !c.is_control() && c != '\u{202e}';
    assert!(ended.stdout.chars().all(clean), "{:?}", ended.stdout);
}
