"""The PostgreSQL that tests run against: real, private, and gone afterwards."""

from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from api.operator.userland import prepare_userland
from tests.harness.postgres import PostgresBinaries, PostgresCluster, find_postgres


def in_the_userland() -> PostgresBinaries:
    root = prepare_userland(log=print)
    (directory,) = (root / "usr/lib/postgresql").glob("*/bin")
    return PostgresBinaries(Path("/") / directory.relative_to(root), root)


@pytest.mark.parametrize("find", [find_postgres, in_the_userland])
def test_what_was_committed_outlives_kill9_and_nothing_outlives_stop(find: object) -> None:
    cluster = PostgresCluster(find())  # type: ignore[operator] # one of the two functions
    with cluster:
        url = cluster.new_database()
        assert url.startswith("postgresql+psycopg://")
        assert cluster.new_database() != url
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            assert connection.scalar(sa.text("SHOW fsync")) == "on"
            connection.execute(sa.text("CREATE TABLE kept (x int)"))
            connection.execute(sa.text("INSERT INTO kept VALUES (7)"))
        cluster.kill9()
        with pytest.raises(sa.exc.OperationalError), engine.connect():
            pass
        cluster.start()
        with engine.begin() as connection:
            assert connection.scalar(sa.text("SELECT x FROM kept")) == 7
        wrong = sa.make_url(url).set(drivername="postgresql", password="wrong").render_as_string(hide_password=False)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(wrong)
        directory = cluster._directory
        assert directory is not None
    cluster.stop()
    assert not directory.exists()
    with pytest.raises(sa.exc.OperationalError), engine.connect():
        pass
