//! Real daemons: what they serve is what the record says; they are ended, and nothing else is.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod site;

use disksnap_core::{ErrorKind, ImageServer, Listen, NbdServer};
use disksnap_test_support::{QemuVersion, need, pattern};
use rustix::process::{Pid, Signal, kill_process};

use site::{Site, image, layer, node, run, text};

#[tokio::test]
async fn an_overlay_is_read_by_the_record_and_not_by_its_header() {
    let site = Site::new();
    let live = site.file("live.raw", &vec![9; 4 << 20]);
    let kept = site.file("kept.raw", &pattern::bytes(1, 4 << 20));
    let top = site.path("top.qcow2");
    // The header names the live file, by absolute path.
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            text(&live),
            text(&top),
        ],
    );
    site.start().await;
    let by_record = image(&top, "qcow2", Some(layer(&kept, "raw")));
    site.serve("kept", &by_record).await.unwrap();
    assert_eq!(site.digest("kept"), pattern::digest_file(&kept));
    // What the record does not have is missed, not guessed.
    let error = site.serve("bare", &image(&top, "qcow2", None)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert!(error.to_string().contains("names the backing file"), "{error}");
    site.stop().await;
}

#[tokio::test]
async fn what_leads_to_files_outside_the_record_is_refused() {
    let site = Site::new();
    let (data, outside) = (
        site.file("data.raw", &vec![7; 1 << 20]),
        site.path("outside.qcow2"),
    );
    let option = format!("data_file={}", text(&site.path("external.raw")));
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &option, text(&outside), "1M"],
    );
    let locked = site.path("locked.qcow2");
    let secret = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=key,data=12345678",
    ];
    let method = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    run(
        "qemu-img",
        &[&secret[..], &["-o", method, text(&locked), "1M"]].concat(),
    );
    let pipe = site.path("pipe");
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    site.start().await;
    for (image, kind) in [
        (image(&outside, "qcow2", None), ErrorKind::Unsupported),
        (image(&locked, "qcow2", None), ErrorKind::Unsupported),
        (image(&data, "vmdk", None), ErrorKind::Unsupported),
        (image(&pipe, "raw", None), ErrorKind::Invalid),
        (image(&site.path("nowhere"), "raw", None), ErrorKind::NotFound),
        (image(&data, "raw", Some(layer(&data, "raw"))), ErrorKind::Invalid),
    ] {
        let error = site.serve("bad", &image).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    assert!(site.served().await.is_empty());
    site.stop().await;
}

#[tokio::test]
async fn it_is_there_until_it_is_stopped_and_leaves_nothing() {
    there_until_stopped(&Site::new()).await;
}

#[tokio::test]
async fn so_is_that_of_an_older_qemu() {
    need!("qemu-7.2");
    there_until_stopped(&Site::with(QemuVersion::V7_2)).await;
}

async fn there_until_stopped(site: &Site) {
    site.stop().await;
    site.start().await;
    let running = site.running().await.unwrap();
    assert!(running.instance.is_some());
    let domains = site.daemons.domains().await.unwrap();
    assert_eq!(domains, std::slice::from_ref(&site.domain));
    // Again is the same one; at another place it is refused.
    site.start().await;
    assert_eq!(site.running().await.unwrap(), running);
    let elsewhere = NbdServer {
        listen: Listen::Unix(site.path("else.sock")),
        ..site.server()
    };
    let error = site.daemons.start(&site.domain, &elsewhere).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let raw = site.file("disk.raw", &pattern::bytes(3, 1 << 20));
    site.serve("disk", &image(&raw, "raw", None)).await.unwrap();
    assert_eq!(site.digest("disk"), pattern::digest_file(&raw));
    assert_eq!(site.served().await, ["ds-disk"]);
    for _ in 0..2 {
        site.daemons.unserve(&site.domain, &node("disk")).await.unwrap();
    }
    assert!(site.served().await.is_empty());
    for _ in 0..2 {
        site.stop().await;
    }
}

/// As a kill before the last step leaves it: the daemon lives, and nothing is recorded.
#[tokio::test]
async fn what_was_never_wholly_started_is_ended() {
    let site = Site::new();
    let forget = || {
        let files = site.run_files();
        let record = files
            .iter()
            .find(|path| path.extension().is_some_and(|is| is == "json"))
            .unwrap();
        std::fs::remove_file(record).unwrap();
    };
    site.start().await;
    forget();
    assert_eq!(site.running().await, None);
    site.start().await;
    let raw = site.file("disk.raw", &[1; 4096]);
    site.serve("disk", &image(&raw, "raw", None)).await.unwrap();
    forget();
    site.stop().await;
}

/// One that hangs does not hear that it is to end.
#[tokio::test]
async fn one_that_hangs_is_killed() {
    let site = Site::new();
    site.start().await;
    let instance = site.running().await.unwrap().instance.unwrap();
    let pid: i32 = instance.split('/').nth(1).unwrap().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
    site.stop().await;
}

/// A socket outside the run directory is the caller's choice of place: what a killed daemon left there is its own, what
/// somebody else put there since is not.
#[tokio::test]
async fn the_socket_of_one_that_was_killed_goes_and_another_s_stays() {
    let site = Site::new();
    let socket = site.path("chosen.sock");
    let server = NbdServer {
        listen: Listen::Unix(socket.clone()),
        ..site.server()
    };
    let killed = async || {
        site.daemons.start(&site.domain, &server).await.unwrap();
        let instance = site.running().await.unwrap().instance.unwrap();
        let pid: i32 = instance.split('/').nth(1).unwrap().parse().unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        while site.running().await.is_some() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        assert!(socket.exists());
    };
    killed().await;
    // Again at the same place, as if nothing had happened.
    killed().await;
    site.stop().await;
    assert!(!socket.exists());
    killed().await;
    std::fs::remove_file(&socket).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    site.stop().await;
    assert!(socket.exists(), "nobody listens there, and it is not ours");
    let error = site.daemons.start(&site.domain, &server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    site.stop().await;
}
