//! `hexz-nbd completions`: what a shell completes, from the same source as --help.

use clap::CommandFactory;
use clap_complete::{Generator, Shell as Known};

use crate::cli::{Cli, Completions, Shell};
use crate::failure::Failure;
use crate::output;

/// Prints the script for one shell.
pub(crate) fn run(options: &Completions) -> Result<(), Failure> {
    let shell = match options.shell {
        Shell::Bash => Known::Bash,
        Shell::Zsh => Known::Zsh,
        Shell::Fish => Known::Fish,
    };
    let mut command = Cli::command();
    command.set_bin_name("hexz-nbd");
    command.build();
    let mut script = Vec::new();
    shell.try_generate(&command, &mut script)?;
    let script = mended(&String::from_utf8_lossy(&script));
    output::print(script)
}

/// The script without two faults of clap_complete 4.6; one that doesn't have them stays as it
/// is, but for a name.
fn mended(script: &str) -> String {
    script
        // Bash's state and the labels that are compared with it spell a name with a hyphen
        // differently, so that nothing is completed behind a command:
        // <https://github.com/clap-rs/clap/issues/6421>.
        .replace("hexz__nbd", "hexz__subcmd__nbd")
        // Where an option still lacks its value, fish's argparse fails; there is no command yet
        // all the same, and the values are to be offered.
        .replace("2>/dev/null\n    or return\n", "2>/dev/null\n    or return 0\n")
}
