//! Implements `hexz-nbd completions`, from the same definitions as `--help`.

use clap::CommandFactory;
use clap_complete::{Generator, Shell as Known};

use crate::cli::{Cli, Completions, Shell};
use crate::commands::output;
use crate::exit_status::Failure;

/// Prints the completion script for a shell.
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
    let script = patched(&String::from_utf8_lossy(&script));
    output::print(script)
}

/// Works around two bugs of clap_complete 4.6. A script without them only has a name changed.
fn patched(script: &str) -> String {
    script
        // Bash's state and the labels that it is compared with spell a name with a hyphen
        // differently, so that nothing is completed after a command:
        // <https://github.com/clap-rs/clap/issues/6421>.
        .replace("hexz__nbd", "hexz__subcmd__nbd")
        // While an option lacks its value, fish's argparse fails. No command has been given at
        // that point, and the values must still be offered.
        .replace("2>/dev/null\n    or return\n", "2>/dev/null\n    or return 0\n")
}
